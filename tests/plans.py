"""The plans of the statements that pgqueue's functions execute, and what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pytest

from .helpers import Connection

# A few batches; far from all that a table holds after it has grown.
FEW_ROWS = 500
FEW_BLOCKS = 50
SCANS_OF_MEMORY = {"Function Scan", "Named Tuplestore Scan", "CTE Scan", "Values Scan"}
# Marks the statements of the tests themselves.
OURS = "/* not of pgqueue */ "


@dataclass
class Plans:
    """The plans of all statements, also inside functions, that a connection executes."""

    connection: Connection
    _logged: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        try:
            self.connection.execute("load 'auto_explain'")
        except psycopg.errors.UndefinedFile:
            pytest.skip("this installation of PostgreSQL has no auto_explain")
        settings = {
            "auto_explain.log_nested_statements": "on",
            "auto_explain.log_analyze": "on",
            "auto_explain.log_timing": "off",
            "auto_explain.log_buffers": "on",
            "auto_explain.log_format": "json",
            "auto_explain.log_level": "notice",
            "client_min_messages": "notice",
        }
        for name, value in settings.items():
            self.connection.execute("select set_config(%s, %s, false)", [name, value])
        self.connection.add_notice_handler(self._keep)

    def _keep(self, notice: psycopg.errors.Diagnostic) -> None:
        _, separator, plan = (notice.message_primary or "").partition("plan:\n")
        if separator:
            self._logged.append(json.loads(plan))

    def of(self, action: Callable[[Connection], object]) -> list[dict[str, Any]]:
        self._logged.clear()
        self.connection.execute("set auto_explain.log_min_duration = 0")
        action(self.connection)
        self.connection.execute("set auto_explain.log_min_duration = -1")
        return list(self._logged)


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", []):
        yield from nodes(child)


def blocks(node: dict[str, Any]) -> int:
    return int(node["Shared Hit Blocks"] + node["Shared Read Blocks"])


def faults(plans: list[dict[str, Any]]) -> set[str]:
    """Accesses to pgqueue's tables that aren't by index, bounded, and to few rows."""
    found = set()
    for plan in plans:
        query = " ".join(plan["Query Text"].split())[:200]
        if query.startswith(OURS):
            continue
        for node in nodes(plan["Plan"]):
            kind, relation = node["Node Type"], node.get("Relation Name")
            rows = node.get("Actual Rows", 0) + node.get("Rows Removed by Filter", 0)
            if rows > FEW_ROWS and kind not in SCANS_OF_MEMORY:
                found.add(f"{kind} of {rows} rows: {query}")
            few_blocks = FEW_BLOCKS * node["Actual Loops"]
            if relation and kind != "ModifyTable" and blocks(node) > few_blocks:
                found.add(f"{kind} of {blocks(node)} blocks of {relation}: {query}")
            if kind == "Seq Scan":
                found.add(f"{kind} of {relation}: {query}")
            condition = node.get("Index Cond", node.get("TID Cond", ""))
            if (
                relation == "deliveries"
                and kind != "ModifyTable"
                and ("message_id" not in condition and "ctid" not in condition)
            ):
                found.add(f"{kind} of {relation} with {condition}: {query}")
    return found
