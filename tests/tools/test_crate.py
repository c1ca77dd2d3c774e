import json

from lafq.study import workspace
from tools import crate


def ids(value):
    """Each "@id" that a value refers to."""
    if isinstance(value, list):
        return set().union(*map(ids, value))
    if isinstance(value, dict):
        return {value["@id"]} if set(value) == {"@id"} else set().union(*map(ids, value.values()))
    return set()


def test_committed_metadata_is_that_of_the_committed_results():
    assert json.loads(crate.PATH.read_text()) == crate.crate()


def test_each_entity_is_described_once_and_each_file_is_there():
    graph = crate.crate()["@graph"]
    described = [entity["@id"] for entity in graph]
    assert len(described) == len(set(described))
    referred = set().union(*(ids(list(entity.values())) for entity in graph)) - {
        "https://w3id.org/ro/crate/1.1"
    }
    assert referred <= set(described)
    files = [entity["@id"] for entity in graph if "File" in entity["@type"]]
    assert len(files) > 40
    assert all((workspace.ROOT / name).is_file() for name in files)
    tables = [action for action in graph if action["@type"] == "CreateAction" and action["result"]]
    assert {action["@id"] for action in tables} >= {"#small-budget", "#paper-05_ratio_sweep"}
