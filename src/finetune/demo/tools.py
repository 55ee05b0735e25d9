"""The demo's tools: what they are called, what they take, and how people ask for them.

Pre-training never shows these tool names or this output format.
"""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass

from finetune.demo.slots import ask, fill


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool: its argument keys with the slot that fills each, and requests that name every slot."""

    name: str
    arguments: Mapping[str, str]
    requests: tuple[str, ...]

    def row(self, rng: random.Random) -> tuple[str, str]:
        """One request in plain English and the call that answers it."""
        values = fill(tuple(self.arguments.values()), rng, made_up=False)
        request = ask(rng.choice(self.requests).format(**values), rng)
        return request, self.call(values)

    def call(self, values: Mapping[str, str]) -> str:
        """The call as compact JSON; numbers and amounts are JSON numbers."""
        arguments = {key: _typed(slot, values[slot]) for key, slot in self.arguments.items()}
        return json.dumps({"tool": self.name, "arguments": arguments}, separators=(",", ":"))


def _typed(slot: str, value: str) -> str | int | float:
    if slot == "number":
        return int(value)
    return float(value) if slot == "amount" else value


TOOLS = (
    Tool(
        "create_note",
        {"title": "title", "folder": "noun"},
        (
            "create a note called {title} in the {noun} folder",
            "start a new note titled {title} under {noun}",
            "make a note named {title} and put it in {noun}",
            "open a fresh note in my {noun} folder and call it {title}",
        ),
    ),
    Tool(
        "append_to_note",
        {"title": "title", "text": "message"},
        (
            "add the line {message} to the note {title}",
            "append to my note {title} that {message}",
            "write down in the {title} note that {message}",
            "jot in the note {title} that {message}",
        ),
    ),
    Tool(
        "move_note",
        {"title": "title", "folder": "noun"},
        (
            "move the note {title} to the {noun} folder",
            "file my {title} note under {noun}",
            "put the existing note {title} into {noun}",
            "shift {title} over to the folder {noun}",
        ),
    ),
    Tool(
        "delete_note",
        {"title": "title"},
        (
            "delete the note {title}",
            "get rid of my {title} note",
            "throw away the note called {title}",
            "remove the note {title} for good",
        ),
    ),
    Tool(
        "search_notes",
        {"query": "title"},
        (
            "search my notes for {title}",
            "find every note about {title}",
            "look through my notes for anything on {title}",
            "Which of my notes mention {title}?",
        ),
    ),
    Tool(
        "rename_file",
        {"old_name": "file", "new_name": "file2"},
        (
            "rename {file} to {file2}",
            "change the file name {file} to {file2}",
            "give {file} the new name {file2}",
            "call the file {file} {file2} from now on",
        ),
    ),
    Tool(
        "share_file",
        {"path": "file", "recipient": "name"},
        (
            "share {file} with {name}",
            "let {name} see the file {file}",
            "give {name} access to {file}",
            "send a link to {file} to {name}",
        ),
    ),
    Tool(
        "set_reminder",
        {"task": "task", "time": "time"},
        (
            "remind me to {task} at {time}",
            "set a reminder for {time} to {task}",
            "At {time}, remind me that I have to {task}.",
            "make sure I {task} at {time}",
        ),
    ),
    Tool(
        "add_event",
        {"title": "title", "day": "day", "time": "time"},
        (
            "put {title} in my calendar on {day} at {time}",
            "schedule {title} for {day} at {time}",
            "book {time} on {day} for {title}",
            "add an event called {title} this {day} at {time}",
        ),
    ),
    Tool(
        "start_timer",
        {"minutes": "number", "label": "noun"},
        (
            "start a timer of {number} minutes for the {noun}",
            "run a timer called {noun} for {number} minutes",
            "time {number} minutes for the {noun}",
            "count down {number} minutes and label it {noun}",
        ),
    ),
    Tool(
        "send_message",
        {"recipient": "name", "text": "message"},
        (
            "tell {name} that {message}",
            "send {name} a message saying {message}",
            "text {name} that {message}",
            "let {name} know that {message}",
        ),
    ),
    Tool(
        "add_to_list",
        {"item": "item", "quantity": "number"},
        (
            "put {number} {item} on the shopping list",
            "add {number} {item} to my shopping",
            "I am out of {item}, so put {number} on the list.",
            "We should buy {number} {item} at the shop.",
        ),
    ),
    Tool(
        "log_expense",
        {"amount": "amount", "category": "item"},
        (
            "log {amount} euros for {item}",
            "note that I paid {amount} for {item}",
            "record an expense of {amount} under {item}",
            "put {amount} euros for {item} in my expenses",
        ),
    ),
    Tool(
        "plan_route",
        {"from": "place", "to": "place2"},
        (
            "plan a route from {place} to {place2}",
            "show me the way to {place2} from {place}",
            "How do I get from {place} to {place2}?",
            "work out the drive from {place} to {place2}",
        ),
    ),
    Tool(
        "convert_units",
        {"value": "amount", "from_unit": "unit", "to_unit": "unit2"},
        (
            "convert {amount} {unit} to {unit2}",
            "How many {unit2} are {amount} {unit}?",
            "turn {amount} {unit} into {unit2}",
            "give me {amount} {unit} in {unit2}",
        ),
    ),
)
