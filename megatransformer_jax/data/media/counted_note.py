"""Says in the log how often data were changed to fit."""

from absl import logging


class CountedNote:
    """Tells in the log how often something was changed: the 1st, 2nd, 4th, 8th, ... time."""

    def __init__(self, words: str):
        self._words = words
        self.count = 0

    # So that the log names the caller's file, which says what was changed.
    @logging.skip_log_prefix
    def add(self, where: str) -> None:
        """Counts one, the latest of which is at `where`."""
        self.count += 1
        if self.count & (self.count - 1) == 0:
            logging.info("%d %s; the latest: %s", self.count, self._words, where)
