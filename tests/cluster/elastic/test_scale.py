import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.config.run_directory import ControlFiles, RunDirectory
from cluster.contracts.errors import ConfigError, PlacementError, PreceptorError
from cluster.elastic.control_files import POLL_SECONDS, ControlRequests, write_message
from cluster.elastic.scale import ScaleRequest, ScaleResponse, Scaling, ask, parse_sizes
from cluster.monitoring.status_file import KeptStatus
from tests.builders import make_config


class Pool:
    """Changes its size at once."""

    def __init__(self, size: int) -> None:
        self.size = size

    def resize(self, size: int) -> None:
        self.size = size


class Driver:
    """Looks at the requests every few milliseconds, as a running driver does every second."""

    def __init__(self, folder: Path, room: int = 100) -> None:
        self.files = ControlFiles(folder / "request.json", folder / "answer.json")
        self.pools = {"rollout": Pool(1), "teachers.math": Pool(1)}
        self.said: list[str] = []
        self.moment = 0.0
        self.scaling = Scaling(
            self.files,
            lambda: self.pools,
            lambda changes: "no room" if sum(changes.values()) > room else None,
            self.said.append,
            clock=lambda: self.moment,
        )
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Driver":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def sizes(self) -> dict[str, int]:
        return {name: pool.size for name, pool in self.pools.items()}

    def _run(self) -> None:
        while not self._over.wait(0.005):
            self.moment += 1
            self.scaling.while_waiting()


def test_a_request_is_granted_and_answered_with_the_sizes_of_all_pools(tmp_path: Path) -> None:
    with Driver(tmp_path) as driver:
        answer = ask(driver.files, {"rollout": 6})
    assert answer.sizes == driver.sizes() == {"rollout": 6, "teachers.math": 1}
    assert driver.said == ["scaled: rollout=6 teachers.math=1"]


def test_one_pool_without_room_refuses_the_whole_request(tmp_path: Path) -> None:
    with Driver(tmp_path, room=3) as driver, pytest.raises(PlacementError, match="rollout=9: no room"):
        ask(driver.files, {"teachers.math": 2, "rollout": 9})
    assert driver.sizes() == {"rollout": 1, "teachers.math": 1}


def test_pools_that_grow_together_need_room_together(tmp_path: Path) -> None:
    with Driver(tmp_path, room=3) as driver, pytest.raises(PlacementError, match=r"rollout=3 teachers.math=3: no room"):
        ask(driver.files, {"rollout": 3, "teachers.math": 3})
    assert driver.sizes() == {"rollout": 1, "teachers.math": 1}


def test_workers_that_leave_make_room_for_those_that_come(tmp_path: Path) -> None:
    with Driver(tmp_path, room=0) as driver:
        driver.pools["rollout"].size = 3
        assert ask(driver.files, {"rollout": 1, "teachers.math": 3}).sizes == {"rollout": 1, "teachers.math": 3}


def test_fewer_workers_always_have_room(tmp_path: Path) -> None:
    with Driver(tmp_path, room=0) as driver:
        driver.pools["rollout"].size = 5
        assert ask(driver.files, {"rollout": 2}).sizes["rollout"] == 2


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"teachers.code": 2}, "no pool 'teachers.code'; this run has rollout, teachers.math"),
        ({"rollout": 0}, "rollout=0: it has at least one worker"),
        ({"rollout": 100_001}, "up to 100000 workers"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, sizes: dict[str, int], sentence: str) -> None:
    with Driver(tmp_path) as driver, pytest.raises(PlacementError, match=sentence):
        ask(driver.files, sizes)


def test_a_run_that_does_not_go_on_is_one_sentence_and_its_request_is_taken_back(tmp_path: Path) -> None:
    files = ControlFiles(tmp_path / "request.json", tmp_path / "answer.json")
    with pytest.raises(PreceptorError, match="no driver answered"):
        ask(files, {"rollout": 2}, timeout_seconds=0.1)
    assert list(tmp_path.iterdir()) == []


def test_commands_that_come_together_are_all_granted(tmp_path: Path) -> None:
    driver = Driver(tmp_path)
    requests = [{"rollout": 6}, {"teachers.math": 3}]
    with ThreadPoolExecutor() as commands:
        answers = [commands.submit(ask, driver.files, request, 60.0) for request in requests]
        time.sleep(2 * POLL_SECONDS)  # both have left their requests before the driver looks
        with driver:
            found = [answer.result().refusal for answer in answers]
    assert found == [None, None]
    assert driver.sizes() == {"rollout": 6, "teachers.math": 3}


def test_who_gives_up_takes_nobody_elses_request_back(tmp_path: Path) -> None:
    files = ControlFiles(tmp_path / "request.json", tmp_path / "answer.json")
    write_message(files.request, ScaleRequest("another's", {"rollout": 3}))
    with pytest.raises(PreceptorError, match="no driver answered"):
        ask(files, {"rollout": 2}, timeout_seconds=0.1)
    assert "another's" in files.request.read_text()


def test_an_answer_stays_for_a_second_however_long_the_driver_took_to_give_it(tmp_path: Path) -> None:
    files = ControlFiles(tmp_path / "request.json", tmp_path / "answer.json")
    moment = 0.0
    reader = ControlRequests(files, clock=lambda: moment)
    write_message(files.request, ScaleRequest("first", {}))
    assert reader.take(ScaleRequest) == ScaleRequest("first", {})
    moment = 5.0
    reader.answer(ScaleResponse("first", {}, None))
    write_message(files.request, ScaleRequest("second", {}))
    moment = 5.9
    assert reader.take(ScaleRequest) is None
    moment = 6.0
    assert reader.take(ScaleRequest) == ScaleRequest("second", {})


def scaled(folder: Path) -> None:
    with Driver(folder) as driver:
        ask(driver.files, {"rollout": 4})
        ask(driver.files, {"teachers.math": 3})


def test_a_resumed_run_has_all_the_sizes_that_were_asked_for(tmp_path: Path) -> None:
    scaled(tmp_path)
    resumed = Driver(tmp_path)
    resumed.scaling.restore()
    assert resumed.sizes() == {"rollout": 4, "teachers.math": 3}
    assert resumed.said == ["as asked before the run was resumed: rollout=4 teachers.math=3"]


def test_a_resumed_run_with_less_room_says_why_its_pools_are_as_they_are(tmp_path: Path) -> None:
    scaled(tmp_path)
    resumed = Driver(tmp_path, room=2)
    resumed.scaling.restore()
    assert resumed.sizes() == {"rollout": 1, "teachers.math": 1}
    assert resumed.said == ["as asked before the run was resumed: rollout=4 teachers.math=3: no room"]


def test_a_resumed_run_brings_back_a_drained_pool_that_it_needs(tmp_path: Path) -> None:
    scaled(tmp_path)
    files = Driver(tmp_path).files
    write_message(files.answer, ScaleResponse("the last", {"rollout": 2, "teachers.math": 0}, None))
    resumed = Driver(tmp_path)
    resumed.scaling.restore()
    assert resumed.sizes() == {"rollout": 2, "teachers.math": 1}


def test_after_a_rewind_a_request_that_was_granted_is_not_granted_again(tmp_path: Path) -> None:
    scaled(tmp_path)
    rewound = Driver(tmp_path)
    rewound.scaling.while_waiting()
    assert rewound.sizes() == {"rollout": 1, "teachers.math": 1}


def test_nothing_is_read_twice_within_a_second(tmp_path: Path) -> None:
    driver = Driver(tmp_path)
    driver.scaling.while_waiting()
    driver.files.request.write_text('{"request_id": "a", "sizes": {"rollout": 2}}')
    driver.moment = 0.9
    driver.scaling.while_waiting()
    assert driver.sizes()["rollout"] == 1
    driver.moment = 1.0
    driver.scaling.while_waiting()
    assert driver.sizes()["rollout"] == 2


def test_nonsense_in_the_place_of_a_request_changes_nothing(tmp_path: Path) -> None:
    driver = Driver(tmp_path)
    driver.files.request.write_text('{"request_id": 5')
    driver.scaling.while_waiting()
    assert driver.sizes() == {"rollout": 1, "teachers.math": 1}


@pytest.mark.parametrize(
    "argument", ["rollout", "rollout=", "=3", "rollout=x", "rollout=-1", "rollout=1.5", "a=9999999"]
)
def test_a_size_that_is_none_is_one_sentence(argument: str) -> None:
    with pytest.raises(ConfigError, match="expected POOL=WORKERS"):
        parse_sizes([argument])


@pytest.mark.parametrize("command", [["scale", "RUN", "rollout=2"], ["teacher", "RUN", "replace", "t", "m"]])
def test_a_run_that_is_over_is_asked_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    directory = RunDirectory.create(make_config(f"run.directory={tmp_path}"))
    with KeptStatus(directory.status, steps=1):
        pass
    assert main([str(directory.path) if word == "RUN" else word for word in command]) == 1
    assert "run: the run is over (ended), so nothing of it can be changed; resume it" in capsys.readouterr().err
    assert not directory.scaling.request.exists()
