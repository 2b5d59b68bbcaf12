"""The three trackers behind ``trackers.Tracker``. Packages are imported when one is opened.

Each says how far it got (``held``) from its own files, which survive a killed process.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_WANDB_FLUSH_SECONDS = 1.0
_WANDB_BLOCK, _WANDB_FILE_HEADER = 32768, 7


class TensorBoard:
    """Event files in ``<run>/tensorboard``, written synchronously: a kill loses no logged step.

    Args:
        folder: of the event files.
        step: the run continues after it. From this step on what is there is marked as void (a
            session start, as of ``SummaryWriter(purge_step=...)``), and it is told again.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._records = Event, Summary, RecordWriter
        folder.mkdir(parents=True, exist_ok=True)
        self.held = step - 0.5 if any(folder.glob("events.out.tfevents.*")) else -1.0
        seconds, rest = divmod(time.time_ns(), 10**9)  # readers sort the files of a run by name
        path = folder / f"events.out.tfevents.{seconds:010d}.{rest:09d}"
        self._file = path.open("xb", buffering=0)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        session = SessionLog(status=SessionLog.START)
        first = max(0, int(self.held + 0.5))
        self._write(Event(wall_time=time.time(), step=first, session_log=session))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One event with a scalar per name."""
        values = [
            self._summary.Value(tag=name, simple_value=value) for name, value in metrics.items()
        ]
        summary = self._summary(value=values)
        self._write(self._event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, event: Any) -> None:
        start, buffer = self._file.tell(), io.BytesIO()
        self._records(buffer).write(event.SerializeToString())
        try:
            written = self._file.write(buffer.getvalue())
            if written != len(buffer.getvalue()):
                raise OSError(f"wrote {written} of {len(buffer.getvalue())} bytes")
        except OSError:
            self._file.truncate(start)  # half an event would hide all later ones
            self._file.seek(start)
            raise


class WandB:
    """Weights & Biases. Offline (``wandb sync`` sends it later) unless asked to be online.

    Nothing is collected beside the numbers: no console, code, git, host, paths or requirements.
    """

    def __init__(
        self,
        folder: Path,
        identity: str,
        mode: str,
        *,
        project: str,
        name: str,
        config: Mapping[str, float],
    ) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self.held = _wandb_held(folder / "wandb", identity)
        settings = wandb.Settings(
            mode=mode,
            silent=True,
            console="off",
            save_code=False,
            disable_code=True,
            disable_git=True,
            host="",
            program="",
            symlink=False,
            login_timeout=60.0,
            finish_timeout=600.0,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
            x_transaction_log_flush_interval=_WANDB_FLUSH_SECONDS,
        )
        self._run = wandb.init(
            project=project,
            name=name,
            id=identity,
            resume="allow",
            dir=str(folder),
            config=dict(config),
            settings=settings,
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One row of the history; a second call for a step adds to it."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class Trackio:
    """Trackio's local database (``TRACKIO_DIR``, else below the Hugging Face home).

    Raises on close when the database lacks steps: its own thread only warns about failures.
    """

    def __init__(
        self, identity: str, *, project: str, name: str, config: Mapping[str, float]
    ) -> None:
        with _without_prints():
            import trackio
        from trackio.sqlite_storage import SQLiteStorage

        self._storage, self._project, self._finish = SQLiteStorage, project, trackio.finish
        # a run is found again by its name, which another run may have been given, too
        self._name = identity if name == identity else f"{name}-{identity}"
        with _without_prints():
            self._run = trackio.init(
                project=project,
                name=self._name,
                config=dict(config),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        rows = self._rows()
        self._logged = len(rows)
        self.held = -1.0
        if rows:
            self.held = rows[-1]["step"] + 0.5 * any(k.startswith("eval/") for k in rows[-1])

    def _rows(self) -> list[dict[str, Any]]:
        return self._storage.get_logs(self._project, self._name, run_id=self._run.id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One row; a thread of trackio writes it half a second later."""
        self._run.log(dict(metrics), step=step)
        self._logged += 1

    def close(self) -> None:
        """Wait for the writing thread and count what arrived."""
        with _without_prints():
            self._finish()
        found = len(self._rows())
        if found < self._logged:
            raise OSError(f"its database holds {found} of {self._logged} rows")


@contextlib.contextmanager
def _without_prints() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _wandb_held(folder: Path, identity: str) -> float:
    """The position up to which the files of this run hold its history; -1: nothing."""
    held = -1.0
    for path in sorted(folder.glob(f"*run-*-{identity}/run-{identity}.wandb")):
        for row in wandb_history(path):
            evaluated = any(name.startswith("eval/") for name in row)
            held = max(held, row["_step"] + 0.5 * evaluated)
    return held


def wandb_history(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of the history in a .wandb file; a torn last one is left out.

    The file is a log of protocol buffers in the format of LevelDB: blocks of 32 KiB, chunks of a
    checksum (4 bytes), a length (2), a type (1: whole, 2 to 4: first, middle, last) and data.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = path.read_bytes(), _WANDB_FILE_HEADER, b""
    while position + 7 <= len(data):
        left = _WANDB_BLOCK - position % _WANDB_BLOCK
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        chunk = data[position + 7 : position + 7 + length]
        if kind == 0 or len(chunk) < length:
            return
        position += 7 + length
        parts += chunk
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                yield {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}
