from pathlib import Path

from benchmarks.harness.hosts import Rack


def test_a_link_between_a_hosts_own_files_is_followed_from_outside(tmp_path: Path) -> None:
    (tmp_path / "head/ray").mkdir(parents=True)
    (tmp_path / "head/ray/list.json").write_text("[]")
    local = tmp_path / "local"  # on the host, its own folder lies there
    (tmp_path / "head/latest").symlink_to(local / "ray/list.json")
    rack = Rack(tmp_path, local, {})
    assert rack.seen_from_here("head", local / "latest").read_text() == "[]"
