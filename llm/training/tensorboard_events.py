"""Event files of TensorBoard, written without TensorFlow."""

import re
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto import event_pb2, summary_pb2

# The framing of event files. TensorBoard's EventFileWriter would import TensorFlow where that is installed.
from tensorboard.summary.writer.record_writer import RecordWriter


class TensorBoardEvents:
    """One new event file. On a resumed run TensorBoard hides what earlier files hold after the restored step."""

    def __init__(self, directory: Path, start_step: int):
        directory.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a run in the order of their names.
        names = [re.match(r'events\.out\.tfevents\.(\d+)', path.name) for path in directory.iterdir()]
        stamps = [int(name[1]) for name in names if name]
        stamp = max([int(time.time()), *(number + 1 for number in stamps)])
        self._file = RecordWriter((directory / f'events.out.tfevents.{stamp:010d}.llm').open('wb'))
        self._write(event_pb2.Event(file_version='brain.Event:2'))
        if stamps:
            first_hidden = start_step + 1 if start_step > 0 else 0
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(event_pb2.Event(step=first_hidden, session_log=start))

    def _write(self, event: event_pb2.Event) -> None:
        event.wall_time = time.time()
        self._file.write(event.SerializeToString())
        self._file.flush()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        values = [
            summary_pb2.Summary.Value(tag=tag.encode('utf-8', 'backslashreplace'), simple_value=value)
            for tag, value in scalars.items()
        ]
        self._write(event_pb2.Event(step=step, summary=summary_pb2.Summary(value=values)))

    def close(self) -> None:
        self._file.close()
