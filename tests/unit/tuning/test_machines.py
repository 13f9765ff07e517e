import pytest

from flowrl.errors import ConfigError
from flowrl.runtime.devices import Gpu
from flowrl.tuning.machines import parse_site, speed_of


def test_devices_machines_memory_and_cores_are_read():
    site = parse_site("2x8xH100,host=1TB,cores=96")
    assert (site.num_machines, site.per_machine, len(site.machine.gpus)) == (2, 8, 16)
    assert (site.device_bytes, site.host_bytes, site.machine.cores) == (80e9, 1e12, 96)
    assert site.speed is not None
    assert site.speed.flops == 989e12
    assert not site.is_assumed


def test_a_size_alone_takes_the_speed_of_a_common_device_and_says_so():
    site = parse_site("4x24GiB")
    assert site.device_bytes == 24 * 2**30
    assert site.is_assumed
    assert "as fast as RTX4090" in str(site)


def test_a_file_says_the_same(tmp_path):
    file = tmp_path / "cluster.yaml"
    file.write_text("{machines: 2, gpus: 8, device: H100, host: 1TB, cores: 96}")
    assert parse_site(str(file)) == parse_site("2x8xH100,host=1TB,cores=96")


def test_a_machine_without_gpus():
    site = parse_site("cpu,host=24GB,cores=2")
    assert (site.machine.gpus, site.machine.cores, site.host_bytes) == ((), 2, 24e9)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "'' is not a number of GPUs"), ("80GB", "'80GB' is not a number of GPUs"), ("8x", "not a number"),
        ("0x80GB", "gpus: is 0"), ("99999x80GB", "99999"), ("8x80", "'80' is not a size"),
        ("8x80kg", "'80kg' is not a size"), ("8x0GB", "not a size"),
        ("8x1MB", "holds no run"), ("8xRTX9999", "not a GPU that flowrl knows"), ("8x80GB,host=", "not a size"),
        ("8x80GB,host=1TB,host=2TB", "twice"), ("8x80GB,cores=many", "is 'many'"),
        ("8x80GB,disk=1TB", "disk=1TB"),
        ("8x80GB,cores", "'cores' is not understood"), ("-8x80GB", "not a number"), ("none.yaml", "cannot be read"),
    ],
)  # fmt: skip
def test_what_is_no_machine_is_refused_in_one_line(text, words):
    with pytest.raises(ConfigError) as caught:
        parse_site(text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [("[", "not valid YAML"), ("- 1", "no mapping"), ("{gpu: 8}", "has no 'gpu'"), ("{gpus: 8}", "does not say which"),
     ("{gpus: eight, device: 80GB}", "'eight'"), ("{gpus: 8, device: 80GB, host: much}", "'much' is not a size"),
     ("{machines: 2, cores: 4}", "2 machines without GPUs")],
)  # fmt: skip
def test_a_file_that_says_no_machines_is_refused_in_one_line(tmp_path, text, words):
    file = tmp_path / "cluster.yml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        parse_site(str(file))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "gigabytes", "speed", "is_assumed"),
    [
        ("NVIDIA A100-SXM4-80GB", 80, "A100-80GB", False),
        ("NVIDIA A100-PCIE-40GB", 40, "A100-40GB", False),
        ("NVIDIA L4", 24, "L4", False),
        ("NVIDIA L40", 48, "L40S", True),
        ("NVIDIA GeForce RTX 4090", 24, "RTX4090", False),
        ("NVIDIA H100 80GB HBM3", 80, "H100", False),
        ("NVIDIA T400", 4, "T4", True),
    ],
)
def test_a_gpu_has_the_speed_of_its_whole_name(name: str, gigabytes: int, speed: str, is_assumed: bool):
    found, is_other = speed_of(Gpu(name=name, total_bytes=gigabytes * 10**9))
    assert (found.name, is_other) == (speed, is_assumed)
