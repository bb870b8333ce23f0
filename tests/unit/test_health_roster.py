"""Which GPUs a node has, scan by scan."""

from services.telemetry.gpu import Card, Driver, DriverState, Gpu, Health, Node, Reading, Sample, Scan
from services.telemetry.roster import Roster

READY = Driver(state=DriverState.READY, version="570")
FAILED = Driver(state=DriverState.FAILED, message="the NVIDIA driver is not loaded")
ABSENT = Driver(state=DriverState.ABSENT, message="no NVIDIA driver on this machine")


def card(index: int, uuid: str = "", problem: str = "") -> Card:
    reading = None if problem else Reading(utilization_percent=7)
    return Card(index=index, uuid=uuid, name=f"card {uuid}" if uuid else "", reading=reading, problem=problem)


def last(*scans: Scan) -> Sample:
    roster = Roster("node-1")
    samples = [roster.update(scan, time) for time, scan in enumerate(scans)]
    return samples[-1]


def ready(*cards: Card) -> Scan:
    return Scan(driver=READY, cards=cards)


def brief(gpu: Gpu) -> tuple[str, int, str, Health]:
    return gpu.uuid, gpu.index, gpu.name, gpu.health


def test_each_card_becomes_a_gpu_of_this_node() -> None:
    (first, second) = last(ready(card(0, "a"), card(1, "b"))).gpus

    assert brief(first) == ("a", 0, "card a", Health.HEALTHY)
    assert brief(second) == ("b", 1, "card b", Health.HEALTHY)
    assert (first.node, first.sample_time, first.reading.utilization_percent) == ("node-1", 0.0, 7)


def test_a_lost_card_keeps_its_identity_and_no_reading() -> None:
    sample = last(ready(card(0, "a"), card(1, "b")), ready(card(0, "a"), card(1, problem="GPU is lost")))

    assert brief(sample.gpus[1]) == ("b", 1, "card b", Health.LOST)
    assert sample.gpus[1].health_reason == "GPU is lost"
    assert sample.gpus[1].reading == Reading()


def test_a_card_that_never_said_who_it_is_goes_by_its_place() -> None:
    unknown = last(ready(card(0, "a"), card(1, problem="Unknown Error")))
    known = last(ready(card(0, "a"), card(1, problem="Unknown Error")), ready(card(0, "a"), card(1, "b")))

    assert brief(unknown.gpus[1]) == ("unknown-node-1-1", 1, "", Health.LOST)
    assert [gpu.uuid for gpu in known.gpus] == ["a", "b"]


def test_a_lost_card_is_not_mistaken_for_one_that_moved_to_its_place() -> None:
    sample = last(
        ready(card(0, "a"), card(1, "b")),
        ready(card(0, problem="GPU is lost"), card(1, "b")),
        ready(card(0, "b")),
    )

    assert {gpu.uuid: gpu.health for gpu in sample.gpus} == {"a": Health.LOST, "b": Health.HEALTHY}


def test_a_well_card_that_is_not_listed_any_more_is_gone() -> None:
    sample = last(ready(card(0, "a"), card(1, "b")), ready(card(0, "a")))

    assert [gpu.uuid for gpu in sample.gpus] == ["a"]


def test_while_the_driver_fails_its_cards_are_lost_and_then_back() -> None:
    away = last(ready(card(0, "a")), Scan(driver=FAILED))
    back = last(ready(card(0, "a")), Scan(driver=FAILED), ready(card(0, "a")))

    assert [(gpu.health, gpu.health_reason) for gpu in away.gpus] == [(Health.LOST, FAILED.message)]
    assert [gpu.health for gpu in back.gpus] == [Health.HEALTHY]


def test_a_card_that_does_not_come_back_with_the_driver_stays_lost() -> None:
    sample = last(ready(card(0, "a"), card(1, "b")), Scan(driver=FAILED), ready(card(0, "b")))

    assert {gpu.uuid: gpu.health_reason for gpu in sample.gpus} == {
        "a": "the driver does not list it any more",
        "b": "",
    }


def test_without_a_driver_there_are_no_gpus() -> None:
    assert last(ready(card(0, "a")), Scan(driver=ABSENT)) == Sample(
        driver=ABSENT, nodes=(Node(name="node-1", driver=ABSENT),)
    )


def test_nothing_has_changed_when_only_time_has_passed() -> None:
    roster = Roster("node-1")
    before, now = (roster.update(ready(card(0, "a")), time) for time in (1.0, 2.0))

    assert now.since(before) is None


def test_a_change_names_what_is_new_different_and_gone() -> None:
    roster = Roster("node-1")
    before = roster.update(ready(card(0, "a"), card(1, "b"), card(2, "c")), 1.0)
    now = roster.update(ready(card(0, "a"), card(1, "b", problem="GPU is lost"), card(2, "d")), 2.0)

    change = now.since(before)

    assert change is not None
    assert [gpu.uuid for gpu in change.gpus] == ["b", "d"]
    assert change.removed_uuids == ("c",)


def test_a_change_of_the_driver_alone_is_told() -> None:
    change = Sample(driver=ABSENT).since(Sample(driver=FAILED))

    assert change is not None
    assert (change.driver, change.gpus) == (ABSENT, ())
