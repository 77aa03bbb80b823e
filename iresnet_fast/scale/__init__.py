"""Operations on many samples: tables in, tables out; folders of files, on one machine or many."""

from .estimate import Estimate, estimate
from .folder import ShardRecord
from .inputs import InputError, InputFile
from .job import Outcome, Place, end_with_parent, make_plan, run
from .lock import BusyError
from .operation import Evaluator, Operation, encode, invert_table, round_trip
from .plan import Plan, Shard
from .ray_engine import run_with_ray
from .verify import verify
from .work import Lost

__all__ = [
    "BusyError",
    "Estimate",
    "Evaluator",
    "InputError",
    "InputFile",
    "Lost",
    "Operation",
    "Outcome",
    "Place",
    "Plan",
    "Shard",
    "ShardRecord",
    "encode",
    "end_with_parent",
    "estimate",
    "invert_table",
    "make_plan",
    "round_trip",
    "run",
    "run_with_ray",
    "verify",
]
