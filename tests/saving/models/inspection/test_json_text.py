from __future__ import annotations

import pytest

from opensmp.errors import SavingError
from opensmp.saving.models.inspection.json_text import configuration_of, object_of


def refused(function, text):
    with pytest.raises(SavingError) as caught:
        function(text, "config.json in a.keras", "load")
    assert str(caught.value).startswith("load: config.json in a.keras is ")
    return str(caught.value)


def test_objects_come_as_text_or_as_bytes():
    for text in ('{"a": "é"}', '{"a": "é"}'.encode()):
        assert object_of(text, "here", "load") == {"a": "é"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("17", "int, where an object"),
        ("[]", "list, where an object"),
        ("null", "null, where an object"),
        ("", "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        ("[" * 10**6, "nested too deeply"),
        ('{"a": 1, "a": 2}', "the key 'a' comes twice"),
        ('{"a":' * 10**5 + "1" + "}" * 10**5, "nested too deeply"),
    ],
    ids=["number", "list", "null", "nothing", "other bytes", "brackets", "a key twice", "objects"],
)
def test_what_is_no_object_says_what_it_is(text, message):
    assert message in refused(object_of, text)


def test_a_configuration_names_a_class_and_configures_it():
    assert configuration_of('{"class_name": "A", "config": {}}', "here", "load")["config"] == {}
    for text in ("{}", '{"class_name": 3, "config": {}}', '{"class_name": "A", "config": []}'):
        assert "Expected: 'class_name', a string, and 'config'" in refused(configuration_of, text)
