"""What an offline W&B run holds, as W&B itself reads it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any


def read_records(run_dir: Path) -> list[dict[str, Any]]:
    """Read the only offline run below `run_dir`, which must have ended."""
    (file,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    if tuple(map(int, version("wandb").split(".")[:2])) < (0, 30):
        return _read_store(file)
    command = [sys.executable, "-m", "wandb", "leet", "inspect", str(file), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def _read_store(file: Path) -> list[dict[str, Any]]:
    """Read it with what W&B had before its command."""
    from google.protobuf.json_format import MessageToDict
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    store, found = DataStore(), []
    store.open_for_scan(str(file))
    while (data := store.scan_data()) is not None:
        record = Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        held = MessageToDict(getattr(record, kind), preserving_proto_field_name=True)
        if kind == "exit":
            held.setdefault("exit_code", 0)  # zeros are left out
        found.append({"type": kind, kind: _name_values(held)})
    return found


def _name_values(held: Any) -> Any:
    """Turn lists of keys with JSON into mappings, at any depth."""
    if isinstance(held, dict):
        return {name: _name_values(value) for name, value in held.items()}
    if not isinstance(held, list):
        return held
    if held and all(isinstance(one, dict) and "value_json" in one for one in held):
        names = (".".join(one.get("nested_key") or [one["key"]]) for one in held)
        return {name: json.loads(one["value_json"]) for name, one in zip(names, held, strict=True)}
    return [_name_values(one) for one in held]
