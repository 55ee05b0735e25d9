"""Templates of pre-training: requests with prose replies and functions, and small stories with questions."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Intent:
    """What people ask for, how they say it, what a polite reply is, and a function for it with its keys."""

    slots: tuple[str, ...]
    requests: tuple[str, ...]
    replies: tuple[str, ...]
    function: str
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Story:
    """A request for a story, its sentences, and questions about it with their answers."""

    slots: tuple[str, ...]
    request: str
    sentences: tuple[str, ...]
    questions: tuple[tuple[str, str], ...]


INTENTS = (
    Intent(
        ("title", "noun"),
        ("write a page called {title} for {noun}", "begin a document {title} in {noun}", "keep {title} under {noun}"),
        ("Of course, {title} is now in {noun}.", "I have begun {title} in {noun} for you."),
        "begin_page",
        ("heading", "shelf"),
    ),
    Intent(
        ("title", "noun"),
        ("take {title} out and bring it to {noun}", "carry {title} over into {noun}", "send my {title} page to {noun}"),
        ("Sure, {title} is in {noun} now.", "Done, I have moved {title} to {noun}."),
        "carry_page",
        ("heading", "shelf"),
    ),
    Intent(
        ("title", "message"),
        ("write in {title} that {message}", "add to {title}: {message}", "In the diary {title}, say that {message}."),
        ("I have written in {title} that {message}.", "Noted in {title}: {message}."),
        "pen_line",
        ("heading", "words"),
    ),
    Intent(
        ("title",),
        ("erase the page {title}", "clear away {title}", "I no longer want {title}, so drop it."),
        ("All right, {title} is gone.", "I have removed {title} for you."),
        "erase_page",
        ("heading",),
    ),
    Intent(
        ("title",),
        ("What do I have on {title}?", "look up {title}", "see what I wrote about {title}"),
        ("I will look for {title}.", "Let me see what there is about {title}."),
        "look_up",
        ("subject",),
    ),
    Intent(
        ("task", "time"),
        (
            "wake me at {time} so that I can {task}",
            "I must {task} at {time}, so tell me then.",
            "At {time} I want to {task}.",
        ),
        ("Sure, I will tell you at {time} to {task}.", "At {time} I will say that you have to {task}."),
        "wake_person",
        ("job", "clock"),
    ),
    Intent(
        ("name", "message"),
        ("write to {name} that {message}", "say to {name} that {message}", "pass on to {name} that {message}"),
        ("I will tell {name} that {message}.", "Of course. {name} will hear that {message}."),
        "pass_word",
        ("whom", "words"),
    ),
    Intent(
        ("name", "time"),
        ("ring {name} at {time}", "call {name} for me at {time}", "phone {name} at {time}"),
        ("I will call {name} at {time}.", "Sure, {name} gets a call at {time}."),
        "ring_person",
        ("whom", "clock"),
    ),
    Intent(
        ("title", "day", "time"),
        (
            "meet for {title} on {day} at {time}",
            "On {day} at {time} there is {title}.",
            "keep {day} {time} free for {title}",
        ),
        ("I have kept {day} at {time} free for {title}.", "Fine, {title} is on {day} at {time}."),
        "hold_hour",
        ("occasion", "weekday", "clock"),
    ),
    Intent(
        ("number", "noun"),
        (
            "wait {number} minutes for the {noun}",
            "The {noun} takes {number} minutes, so watch it.",
            "stop the {noun} after {number} minutes",
        ),
        ("I will wait {number} minutes for the {noun}.", "The {noun} has {number} minutes from now."),
        "wait_for",
        ("span", "thing"),
    ),
    Intent(
        ("number", "item"),
        ("get {number} {item} at the market", "bring home {number} {item}", "order {item}, {number} of them"),
        ("I will get {number} {item} for you.", "Sure, that is {number} {item}."),
        "fetch_goods",
        ("count", "goods"),
    ),
    Intent(
        ("amount", "item"),
        ("pay {amount} for the {item}", "The {item} cost me {amount}.", "I spent {amount} on {item}."),
        ("I have written up {amount} for {item}.", "Noted, the {item} cost {amount}."),
        "pay_bill",
        ("price", "goods"),
    ),
    Intent(
        ("place", "place2"),
        (
            "find a train from {place} to {place2}",
            "I am in {place} and want to go to {place2}.",
            "Which road goes from {place} to {place2}?",
        ),
        ("From {place} you go to {place2} by train.", "I will find the way from {place} to {place2}."),
        "find_train",
        ("start", "goal"),
    ),
    Intent(
        ("file", "name"),
        ("print {file} for {name}", "show {file} to {name}", "{name} wants {file}."),
        ("I have given {file} to {name}.", "Sure, {name} has {file} now."),
        "hand_over",
        ("document", "whom"),
    ),
    Intent(
        ("file", "file2"),
        ("copy {file} as {file2}", "save {file} again under {file2}", "The name {file} is bad, so take {file2}."),
        ("The file {file} is now {file2}.", "Done, {file} is saved as {file2}."),
        "copy_document",
        ("document", "twin"),
    ),
    Intent(
        ("amount", "unit", "unit2"),
        (
            "I have {amount} {unit} but want {unit2}.",
            "say {amount} {unit} as {unit2}",
            "from {amount} {unit} make {unit2}",
        ),
        ("I will work out {amount} {unit} in {unit2}.", "Let me see how many {unit2} there are in {amount} {unit}."),
        "reckon",
        ("size", "measure", "measure_wanted"),
    ),
    Intent(
        ("name", "place"),
        ("find out if {name} lives in {place}", "ask {name} about {place}", "book a room in {place} for {name}"),
        ("I will ask {name} about {place}.", "Certainly, {name} and {place} are on my list."),
        "ask_about",
        ("whom", "town"),
    ),
    Intent(
        ("noun", "number"),
        ("set the {noun} to {number}", "turn the {noun} up to {number}", "make it {number} on the {noun}"),
        ("The {noun} is at {number} now.", "I have set the {noun} to {number}."),
        "turn_dial",
        ("thing", "level"),
    ),
    Intent(
        ("title", "name"),
        ("play {title} by {name}", "read {title} by {name} to me", "I want to hear {title} by {name}."),
        ("Here is {title} by {name}.", "Now playing {title} by {name}."),
        "play_piece",
        ("piece", "artist"),
    ),
    Intent(
        ("item", "place", "day"),
        (
            "order {item} from {place} for {day}",
            "On {day} I want {item} from {place}.",
            "have {item} sent from {place} by {day}",
        ),
        ("I have ordered {item} from {place} for {day}.", "On {day} the {item} will come from {place}."),
        "order_goods",
        ("goods", "town", "weekday"),
    ),
    Intent(
        ("name", "number"),
        ("give {name} {number} points", "{name} has won {number} points.", "count {number} more for {name}"),
        ("{name} now has {number} points.", "I gave {number} points to {name}."),
        "give_points",
        ("whom", "points"),
    ),
    Intent(
        ("task", "name", "day"),
        ("ask {name} to {task} on {day}", "get {name} to {task} by {day}", "On {day}, {name} should {task}."),
        ("I will ask {name} to {task} on {day}.", "On {day} {name} will {task}."),
        "hand_job",
        ("job", "whom", "weekday"),
    ),
)

STORIES = (
    Story(
        ("name", "place", "title", "name2"),
        "tell me a story about {name}, {place} and a {title} for {name2}",
        (
            "{name} lived in {place}.",
            "One day {name} found a {title}.",
            "{name2} saw it and was glad.",
            "They took the {title} home.",
        ),
        (
            ("Where did {name} live?", "{place}."),
            ("What did {name} find?", "A {title}."),
            ("Who was glad?", "{name2}."),
            ("Who lived in {place}?", "{name}."),
        ),
    ),
    Story(
        ("name", "number", "item", "place"),
        "tell me about {name}, who took {number} {item} to {place}",
        (
            "{name} had {number} {item}.",
            "It was a long way to {place}, but {name} walked there.",
            "In {place} the {item} were sold.",
        ),
        (
            ("How many {item} did {name} have?", "{number}."),
            ("What was sold in {place}?", "{item}."),
            ("Where did {name} walk?", "To {place}."),
        ),
    ),
    Story(
        ("name", "task", "day", "time"),
        "tell me how {name} had to {task} on {day} at {time}",
        ("On {day}, {name} got up early.", "At {time} it was time to {task}.", "{name} was tired, but happy."),
        (
            ("When did {name} have to {task}?", "At {time}."),
            ("What did {name} have to do?", "{task}."),
            ("On which day was it?", "{day}."),
        ),
    ),
    Story(
        ("name", "name2", "message", "noun"),
        "tell me what {name} said to {name2} by the {noun}: {message}",
        ("{name} met {name2} by the {noun}.", "{name} said that {message}.", "{name2} laughed, and they went home."),
        (
            ("What did {name} say?", "{message}."),
            ("Who laughed?", "{name2}."),
            ("Where did they meet?", "By the {noun}."),
        ),
    ),
)
