"""One JSON object per line on stderr."""

import json
import logging
import logging.config
from datetime import UTC, datetime

__all__ = ["JsonLines", "start_logging"]

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName", "color_message"}


class JsonLines(logging.Formatter):
    """``{"time", "level", "logger", "message", ...}`` with the record's extra fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update(
            {key: value for key, value in record.__dict__.items() if key not in _STANDARD and value is not None}
        )
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def start_logging(*, quiet: bool = False) -> None:
    """Send everything that is logged to stderr; ``quiet`` leaves out what is neither a warning nor an error."""
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"json": {"()": JsonLines}},
            "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json"}},
            "root": {"level": "WARNING" if quiet else "INFO", "handlers": ["stderr"]},
            # It announces each stage of its start and end; ours says the same once.
            "loggers": {"uvicorn": {"level": "WARNING"}, "uvicorn.access": {"level": "CRITICAL"}},
        }
    )
