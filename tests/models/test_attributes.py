"""Which attributes a plan or a record may set."""

from __future__ import annotations

import json
from typing import Any

import pytest

from surgery.errors import PlanError
from surgery.models.attributes import check_attributes
from tests.tiny_models import tiny_model


@pytest.mark.parametrize("held", [((1, 2), (3, 4)), {"sizes": (1, 2)}, (1, 2), 1e-6])
def test_what_a_module_holds_may_be_set_as_json_reads_it(held: Any) -> None:
    model = tiny_model("llama")
    model.lm_head.held = held
    check_attributes(model, {"lm_head": {"held": json.loads(json.dumps(held))}})
    with pytest.raises(PlanError, match="lm_head: is not an attention block"):
        check_attributes(model, {"lm_head": {"held": [[1, 2], [3, 5]]}})
