"""Error bodies and statuses that clients receive."""

from __future__ import annotations

from veneer.serve.http.errors import error_body, message_of
from veneer.serve.request import Refused


def test_an_error_and_its_fix_are_one_line() -> None:
    error = Refused("The model does not exist.", status=404, code="model_not_found", fix="see GET /v1/models")
    assert message_of(error) == "The model does not exist: see GET /v1/models"


def test_a_404_of_openais_routes_has_openais_type_and_code() -> None:
    file = Refused("No such File object: file-1", status=404, code="not_found", param="id")
    want = {"message": file.what, "type": "invalid_request_error", "param": "id", "code": None}
    assert error_body(file, "OpenAI files") == (404, {"error": want})
    model = Refused("The model does not exist.", status=404, code="model_not_found", param="model")
    assert error_body(model, "OpenAI")[1]["error"]["code"] == "model_not_found"
