import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cluster.contracts.errors import CheckpointError
from cluster.weight_sync.manifest import checksum
from learner.checkpointing.shards import ShardWriter, host_copy, read_shard, write_shard

TENSORS = {
    "bytes": torch.arange(5, dtype=torch.uint8),
    "wide": torch.arange(4, dtype=torch.int64),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "matrix": torch.arange(6.0).reshape(2, 3),
    "number": torch.tensor(7.0),
    "empty": torch.zeros(0),
}


def test_the_safetensors_library_reads_what_is_written(tmp_path: Path) -> None:
    write_shard(tmp_path / "shard", TENSORS)
    for found in (load_file(tmp_path / "shard"), read_shard(tmp_path / "shard")):
        assert found.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert torch.equal(found[name], tensor), name
            assert found[name].dtype == tensor.dtype


def test_size_and_checksum_are_those_of_the_file(tmp_path: Path) -> None:
    entry = write_shard(tmp_path / "shard", TENSORS)
    content = (tmp_path / "shard").read_bytes()
    assert (entry.name, entry.num_bytes, entry.checksum) == ("shard", len(content), checksum([content]))


def test_every_tensor_begins_at_a_multiple_of_its_width(tmp_path: Path) -> None:
    write_shard(tmp_path / "shard", TENSORS)
    content = (tmp_path / "shard").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    assert length % 8 == 0
    for name, entry in json.loads(content[8 : 8 + length]).items():
        assert entry["data_offsets"][0] % TENSORS[name].element_size() == 0, name


def test_training_on_does_not_change_what_is_written(tmp_path: Path) -> None:
    live = torch.zeros(1000)
    writer = ShardWriter()
    writer.begin(tmp_path / "shard", host_copy({"live": live}))
    live.fill_(1.0)
    assert writer.finish().entry.num_bytes == (tmp_path / "shard").stat().st_size
    assert writer.is_done
    assert not read_shard(tmp_path / "shard")["live"].any()


def test_what_was_read_outlives_its_file(tmp_path: Path) -> None:
    write_shard(tmp_path / "shard", {"a": torch.ones(10_000)})
    found = read_shard(tmp_path / "shard")
    os.truncate(tmp_path / "shard", 0)
    assert found["a"].sum() == 10_000


def test_a_writer_that_was_given_up_can_begin_again(tmp_path: Path) -> None:
    writer = ShardWriter()
    writer.begin(tmp_path / "absent" / "shard", TENSORS)
    writer.begin(tmp_path / "shard", TENSORS)
    assert writer.finish().entry.name == "shard"


def test_a_place_that_is_gone_is_one_sentence(tmp_path: Path) -> None:
    writer = ShardWriter()
    writer.begin(tmp_path / "absent" / "shard", TENSORS)
    with pytest.raises(CheckpointError, match=r"absent: cannot write shard: No such file or directory$"):
        writer.finish()


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"\xff" * 64, b"\x08" + b"\0" * 7 + b"not json"])
def test_what_is_no_safetensors_file_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "shard").write_bytes(content)
    with pytest.raises(CheckpointError, match="shard is no readable safetensors file") as refused:
        read_shard(tmp_path / "shard")
    assert "\n" not in str(refused.value)
