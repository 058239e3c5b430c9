"""The numbers of a run by step."""

import json
from pathlib import Path
from typing import Any

from modeling_fer.evaluation.metrics import write_whole


class History:
    """The run's numbers by step, one JSON object a line; resuming drops what came after the checkpoint."""

    def __init__(self, path: Path, step: int, is_main: bool) -> None:
        self.path, self.is_main = path, is_main
        self.rows: list[dict[str, Any]] = []
        if is_main:
            if path.exists() and step:
                rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
                self.rows = [row for row in rows if row["step"] <= step]
            write_whole(path, "".join(json.dumps(row) + "\n" for row in self.rows).encode())

    def add(self, row: dict[str, Any]) -> None:
        """Append one row."""
        if self.is_main:
            self.rows.append(row)
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
