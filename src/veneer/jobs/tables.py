"""Tables of jobs and uploaded files in the library's database.

Times are seconds since 1970; amounts of money are in millionths. `store` and `files` describe the contents.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import BigInteger, Column, Float, ForeignKey, Index, Integer, MetaData, Table, Text

from veneer.library.database import Key
from veneer.library.migrate import Schema, append_only

_TABLES = MetaData()


def _columns(kind: Any, *names: str, nullable: bool = False, default: Any = None) -> list[Column[Any]]:
    return [Column(name, kind, nullable=nullable, default=default) for name in names]


# -- jobs --------------------------------------------------------------------------------------------------------------

job_table = Table(
    "jobs",
    _TABLES,
    Column("id", Key(), primary_key=True),
    Column("number", BigInteger, nullable=False, unique=True),  # order of creation
    *_columns(Key(), "tenant", "name", "state"),
    *_columns(Text, "config", "about"),  # JSON
    *_columns(Text, "plan", "error", "result", nullable=True),  # JSON
    *_columns(Float, "created"),
    *_columns(Float, "queued", "started", "ended", nullable=True),
    *_columns(BigInteger, "step", "steps", "tokens", "price", "planned", default=0),  # "planned" is the planned cost
    *_columns(Float, "seconds", default=0.0),
    *_columns(Integer, "attempt", "faults", default=0),
    *_columns(Key(), "token", "worker", nullable=True),
    *_columns(Float, "renewed", "until", nullable=True),
    *_columns(Text, "place", default=""),  # the executor's handle of the process
    Index("jobs_of_tenant", "tenant", "number"),
    Index("jobs_by_state", "state", "number"),
)
job_event_table = Table(
    "job_events",
    _TABLES,
    Column("job", Key(), ForeignKey(job_table.c.id), primary_key=True),
    Column("number", BigInteger, primary_key=True, autoincrement=False),  # from 1
    *_columns(Float, "at"),
    *_columns(Key(), "level", "kind"),
    *_columns(Text, "message", "data"),  # data: JSON
)
job_checkpoint_table = Table(
    "job_checkpoints",
    _TABLES,
    Column("job", Key(), ForeignKey(job_table.c.id), primary_key=True),
    Column("step", BigInteger, primary_key=True, autoincrement=False),
    *_columns(Float, "at"),
    *_columns(Text, "metrics"),  # JSON
    *_columns(Text, "reference", nullable=True),
)
job_bill_table = Table(
    "job_bills",
    _TABLES,
    Column("job", Key(), ForeignKey(job_table.c.id), primary_key=True),
    *_columns(Key(), "tenant", "name", "day", "state"),
    *_columns(Float, "at", "seconds"),
    *_columns(BigInteger, "tokens", "price", "cost"),
    Index("job_bills_of_tenant", "tenant", "day"),
)

job_reservation_table = Table(
    "job_reservations",
    _TABLES,
    Column("tenant", Key(), primary_key=True),
    Column("month", Key(), primary_key=True),  # such as 2026-11, in UTC
    *_columns(BigInteger, "spent"),  # budget used by Tinker clients: billed or reserved
)

# -- files -------------------------------------------------------------------------------------------------------------

_COUNTED = BigInteger().with_variant(Integer, "sqlite")
job_file_table = Table(
    "job_files",
    _TABLES,
    Column("number", _COUNTED, primary_key=True, autoincrement=True),  # order of upload
    Column("id", Key(), nullable=False, unique=True),
    *_columns(Key(), "tenant"),
    *_columns(Text, "filename"),
    *_columns(Key(), "purpose", "sha256"),
    *_columns(BigInteger, "bytes"),
    *_columns(Float, "created"),
    Column("expires", Float, index=True),  # NULL: never
    Index("job_files_content", "tenant", "sha256"),
)


JOB_SCHEMA = Schema(
    "the tables of jobs",
    _TABLES,
    Path(__file__).parent / "versions",
    "job_version",
    0x6A6F6273,
    lambda c: append_only(c, ("job_bills",), "bills of jobs are", "job_records_fixed"),
    private=True,  # events quote training rows; the preflight event quotes a whole row
)
