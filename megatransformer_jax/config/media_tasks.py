"""What a row of text, images and sound may be, as a table of tasks."""

import dataclasses
import types
from collections.abc import Mapping

# As many as a row has slots.
FILLS_ROW = -1


@dataclasses.dataclass(frozen=True)
class RowTask:
    """What the rows of a task hold. Numbers of media may be `FILLS_ROW`.

    Attributes:
      source: 'images', 'audio', 'documents' or 'text': each row has one record of it, and may draw
        more.
      images: images of a row; other tasks than documents take them from data.media.images.
      clips: clips of a row; other tasks than documents take them from data.media.audio.
      drawn: of the images, those that the model learns to draw, at most.
      spoken: of the clips, those that the model learns to make, at most.
    """

    source: str
    images: int = 0
    clips: int = 0
    drawn: int = 0
    spoken: int = 0


ROW_TASKS: Mapping[str, RowTask] = types.MappingProxyType(
    {
        "draw": RowTask("images", images=1, drawn=1),
        "caption": RowTask("images", images=1),
        "which": RowTask("images", images=FILLS_ROW),
        "fewshot": RowTask("images", images=FILLS_ROW),
        "speak": RowTask("audio", clips=1, spoken=1),
        "transcribe": RowTask("audio", clips=1),
        "which_clip": RowTask("audio", clips=FILLS_ROW),
        "read_aloud": RowTask("images", images=1, clips=1, spoken=1),
        "documents": RowTask(
            "documents", images=FILLS_ROW, clips=FILLS_ROW, drawn=FILLS_ROW, spoken=FILLS_ROW
        ),
        "text": RowTask("text"),
    }
)
# Those that read data.media.images, and those that read data.media.audio.
IMAGE_TASKS, AUDIO_TASKS = (
    tuple(
        name
        for name, task in ROW_TASKS.items()
        if getattr(task, medium) and task.source != "documents"
    )
    for medium in ("images", "clips")
)
