"""What to say when a device has no memory left, the same words for every engine."""

from finetune.core.errors import OutOfMemory


def memory_ran_out(reason: str) -> OutOfMemory:
    """The error for an allocation that failed, with what to lower."""
    return OutOfMemory(
        f"Memory ran out: {reason.strip() or 'allocation failed'}. Lower training.batch_size or "
        "training.max_batch_tokens or data.max_length, or set training.gradient_checkpointing: true."
    )
