"""How a line of the log looks: the time, the level if it matters, the message."""

import logging


class LineFormatter(logging.Formatter):
    """`12:34:56 step 10/700 ...`; from warnings upwards the level comes before the message.

    Args:
      has_date: puts the date before the time, for a file that outlives the day.
    """

    def __init__(self, has_date: bool = False):
        super().__init__(datefmt="%Y-%m-%d %H:%M:%S" if has_date else "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line, to which the base class adds a traceback if there is one."""
        level = "" if record.levelno == logging.INFO else f"{record.levelname}: "
        return f"{self.formatTime(record, self.datefmt)} {level}{record.message}"
