"""The machines that a user names, and what their ranks are told."""

import json

import pytest

from edgekv.errors import ConfigError
from edgekv.ranks.hosts import machines, places

MESH = [
    {"ssh": "one", "ips": ["127.0.0.1"], "rdma": [None, "rdma_en2"]},
    {"ssh": "two", "ips": ["10.0.0.2"], "rdma": ["rdma_en3", None]},
]


@pytest.fixture
def hostfile(tmp_path):
    def write(content):
        path = tmp_path / "hosts.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def test_local_ranks_have_ports_of_their_own_on_loopback():
    told = places(machines(local=3))
    assert [place.rank for place in told] == [0, 1, 2]
    assert {place.control for place in told} == {told[0].control}
    assert len({place.token for place in told}) == 1
    assert len(told[0].token) == 32
    assert told[0].token != places(machines(local=3))[0].token
    ring = json.loads(told[0].mlx_files["MLX_HOSTFILE"])
    addresses = [told[0].control, *(address for node in ring for address in node)]
    assert len(set(addresses)) == 4
    assert {address.split(":")[0] for address in addresses} == {"127.0.0.1"}


def test_ports_of_several_machines_follow_one_another():
    told = places(machines(hosts="127.0.0.1,10.0.0.2"), first_port=5000)
    assert told[1].control == "127.0.0.1:5000"
    assert told[1].hosts == ("127.0.0.1", "10.0.0.2")
    assert json.loads(told[1].mlx_files["MLX_HOSTFILE"]) == [["127.0.0.1:5001"], ["10.0.0.2:5002"]]
    assert places(machines(hosts="127.0.0.1,10.0.0.2"))[0].control == "127.0.0.1:32323"


def test_a_hostfile_of_mlx_is_read(hostfile):
    hosts = [
        {"ssh": "one", "ips": ["127.0.0.1", "127.0.0.2"]},
        {"ssh": "two", "ips": ["10.0.0.2", "10.0.0.3"]},
    ]
    path = hostfile({"backend": "ring", "envs": ["MLX_METAL_FAST_SYNCH=1"], "hosts": hosts})
    these = machines(hostfile=path)
    assert these.environ == {"MLX_METAL_FAST_SYNCH": "1"}
    assert [host.is_here for host in these.hosts] == [False, False]
    ring = json.loads(places(these, first_port=10)[0].mlx_files["MLX_HOSTFILE"])
    assert ring == [["127.0.0.1:11", "127.0.0.2:12"], ["10.0.0.2:13", "10.0.0.3:14"]]


def test_jaccl_is_told_of_its_devices_and_where_to_meet(hostfile):
    these = machines(hostfile=hostfile(MESH), backend="jaccl")  # a list, as mlx.launch takes too
    place = places(these, first_port=7)[1]
    assert place.backend == "jaccl"
    assert place.mlx_environ == {"MLX_JACCL_COORDINATOR": "127.0.0.1:8"}
    assert json.loads(place.mlx_files["MLX_IBV_DEVICES"]) == [
        [None, "rdma_en2"],
        ["rdma_en3", None],
    ]


def test_the_first_host_must_be_this_machine():
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1, is not this machine"):
        places(machines(hosts="192.0.2.1,10.0.0.2"))


@pytest.mark.parametrize("port", [-1, 65536, 65534])
def test_ports_that_are_none_are_refused(port):
    with pytest.raises(ConfigError, match="port"):
        places(machines(local=2), first_port=port)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "which machines"),
        ({"local": 2, "hosts": "127.0.0.1,127.0.0.1"}, "which machines"),
        ({"local": 1}, "local"),
        ({"local": 65}, "local"),
        ({"local": 2, "backend": "mpi"}, "backend"),
        ({"local": 2, "backend": "jaccl"}, "rdma of 127.0.0.1"),
        ({"hosts": "127.0.0.1"}, "hosts"),
        ({"hosts": "127.0.0.1,,127.0.0.2"}, "ssh"),
        ({"hosts": "127.0.0.1,mac.local"}, "ips of mac.local"),
        ({"hosts": "127.0.0.1,-oProxyCommand=x"}, "ssh"),
        ({"hosts": "0.0.0.0,10.0.0.2"}, r"0\.0\.0\.0"),
        ({"hosts": "127.0.0.1,224.0.0.1"}, r"224\.0\.0\.1"),
        ({"hosts": "::1,::1"}, "::1"),
    ],
)
def test_what_names_no_machines_is_refused_by_name(options, named):
    with pytest.raises(ConfigError, match=named):
        machines(**options)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", r"hosts\.json"),
        ("3", r"hosts\.json"),
        ({"backend": "ring"}, r"hosts\.json.*hosts"),
        ([{"ips": ["127.0.0.1"]}, MESH[1]], "ssh"),
        ([MESH[0]], "hosts is"),
        ([{"ssh": "one", "ips": []}, {"ssh": "two", "ips": ["10.0.0.2"]}], "ips of one"),
        ([{"ssh": "one", "ips": "10.0.0.1"}, {"ssh": "two", "ips": ["10.0.0.2"]}], "ips of one"),
        ([{"ssh": "one", "ips": [3]}, {"ssh": "two", "ips": ["10.0.0.2"]}], "ips of one"),
        ([{"ssh": 1, "ips": ["10.0.0.1"]}, {"ssh": "two", "ips": ["10.0.0.2"]}], "ssh"),
        ({"backend": "nccl", "hosts": MESH}, "backend is 'nccl'"),
        ({"backend": ["ring"], "hosts": MESH}, "backend"),
        ({"hosts": [3, 4]}, "host is 3"),
        ({"envs": "A=1", "hosts": MESH}, "envs"),
        ({"envs": ["A"], "hosts": MESH}, "envs"),
        ({"backend": "jaccl", "hosts": [MESH[0], MESH[0]]}, "rdma of one"),
        ({"backend": "jaccl", "hosts": [MESH[0], {**MESH[1], "rdma": ["a"]}]}, "rdma of two"),
        ({"backend": "jaccl", "hosts": [MESH[0], {**MESH[1], "rdma": 3}]}, "rdma of two"),
    ],
)
def test_a_damaged_hostfile_is_refused_by_field(hostfile, content, named):
    with pytest.raises(ConfigError, match=named):
        machines(hostfile=hostfile(content))


def test_a_hostfile_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.json"):
        machines(hostfile=tmp_path / "none.json")
