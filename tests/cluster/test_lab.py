"""lab.toml: every key is declared once; what it cannot be is one line, exit 2, before anything leaves."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

import pytest
from slipway.cluster import settings
from slipway.commands.submit import STEPS
from slipway.errors import UsageError

SLURM = """
host = "login"
job_dir = "/lustre/me/jobs"
image = "/lustre/me/slipway.sqsh"
mounts = ["/lustre/me:/shared", "/lustre/me/nemo:/nemo"]
nodes = 5

[env]
NEMO_HOME = "/nemo"
"""
KUBERNETES = 'kind = "kubernetes"\nimage = "ghcr.io/org/slipway:1"\nmounts = ["claim:/shared"]\n'
WHOLE = {verb: kind.whole for verb, kind in STEPS.items()}


def read(tmp_path: Path, text: str) -> settings.Lab:
    (tmp_path / "lab.toml").write_text(text)
    return settings.read(tmp_path / "lab.toml", WHOLE)


@pytest.mark.parametrize(
    "text, said",
    [
        ("partitoin = 'x'\n" + SLURM, "unknown key partitoin, did you mean partition?"),
        ("queue = 'x'\n" + SLURM, "unknown key queue; it belongs to kind = 'kubernetes'"),
        (KUBERNETES + "partition = 'x'\n", "unknown key partition; it belongs to kind = 'slurm'"),
        ("kind = ['slurm']\n" + SLURM, "kind is ['slurm']; it must be one of slurm, kubernetes"),
        ("kind = 'slrum'\n" + SLURM, "kind is 'slrum'; it must be one of slurm, kubernetes, did you mean slurm?"),
        (SLURM.replace("nodes = 5", "nodes = 0"), "nodes is 0; it must be 1 to 100000"),
        (SLURM.replace("nodes = 5", "nodes = 'five'"), "nodes is 'five'; it must be a whole number"),
        (SLURM.replace("nodes = 5", "nodes = true"), "nodes is True; it must be a whole number"),
        (SLURM.replace('mounts = ["', 'mounts = ["data:/x", "'), "mount 'data:/x' is not /FOLDER:/WHERE"),
        (SLURM.replace('"/lustre/me/nemo:/nemo"', '"/a:/shared"'), "two mounts have the target /shared"),
        (SLURM.replace('mounts = ["/lustre/me:/shared"', "mounts = [3"), "mounts must be a list of texts"),
        (SLURM.replace('job_dir = "/lustre/me/jobs"', ""), "job_dir is None; it must be a whole path"),
        (SLURM.replace('"login"', '"-oProxyCommand=x"'), "host is '-oProxyCommand=x'"),
        (SLURM.replace('"login"', '"login:22"'), "write ssh://USER@HOST:PORT"),
        (SLURM.replace('image = "/lustre/me/slipway.sqsh"', ""), "mounts have no meaning without an image"),
        ("time = 'soon'\n" + SLURM, "time is 'soon'; write it as 24:00:00"),
        ("time = '00:05:00'\n" + SLURM, "stop_before is 600 s, but time is only 300 s"),
        ("name = 'My run'\n" + SLURM, "name is 'My run'"),
        (SLURM + 'HF_TOKEN = "hf_x"\n', "[env] HF_TOKEN looks like a secret; put it into a file on the cluster"),
        (SLURM + 'WANDB_API_KEY = "x"\n', "[env] WANDB_API_KEY looks like a secret"),
        (SLURM + 'https_proxy = "http://me:pw@proxy:80"\n', "is a URL with a password; put it into the file of"),
        (SLURM + 'A = "x\\ny"\n', "[env] A is 'x\\ny'; it must be one line"),
        (SLURM + '"A B" = "x"\n', "'A B' is not the name of a variable"),
        (SLURM + "[sbatch]\nnodes = 3\n", "[sbatch] nodes: give it with the key `nodes`"),
        (SLURM + "[sbatch]\ndependency = 'x'\n", "[sbatch] dependency: `slipway submit` sets this flag itself"),
        (SLURM + "[sbatch]\nA = 'x'\n", "[sbatch] 'A' is no long flag of sbatch"),
        (SLURM + "[step.trian]\nnodes = 3\n", "[step.trian] is for no step, did you mean train?"),
        (SLURM + "[step.import]\nnodes = 3\n", "[step.import] nodes is 3; `import` runs on one node"),
        (
            SLURM + "[step.import]\nexclusive = true\n",
            "[step.import] exclusive has no meaning there; it is for `train`",
        ),
        (SLURM + "[step.train]\ncpus = 3\n", "[step.train] cpus has no meaning there; it is for steps that do not"),
        (SLURM + "[step.doctor]\nstop_before = 900\n", "[step.doctor] stop_before has no meaning there"),
        (SLURM + "[step.import]\njob_dir = '/x'\n", "[step.import] job_dir is the same for all steps"),
        (SLURM + "[step]\nimport = 3\n", "step.import must be a table"),
        ("env = 3\n" + SLURM.partition("[env]")[0], "env must be a table"),
        ("host = \n", "is not TOML"),
        (KUBERNETES.replace("claim:", "/data:"), "is not CLAIM:/WHERE"),
        (KUBERNETES.replace("ghcr.io/org/slipway:1", "/a.sqsh"), "pods need the name of an image in a registry"),
        (
            KUBERNETES + "shared_memory = '64GB'\n",
            "shared_memory is '64GB'; it must be a number with a unit, such as 64Gi",
        ),
        (KUBERNETES + "shared_memory = '-1Gi'\n", "shared_memory is '-1Gi'; it must be"),
        (KUBERNETES + "[limits]\nmemory = '1 Ti'\n", "[limits] memory is '1 Ti'; it must be a number with a unit"),
        (KUBERNETES + "[limits]\nmemroy = '1Ti'\n", "[limits] 'memroy' is nothing that a pod can ask for: cpu, memory"),
        (KUBERNETES + "[limits]\n'rdma/hca' = '1.5'\n", "[limits] rdma/hca is '1.5'; of a device it must be a whole"),
        ('kind = "kubernetes"\n', "image is missing; pods need one"),
        (KUBERNETES + "[step.import]\nimage = '/a.sqsh'\n", "[step.import] image is '/a.sqsh'; pods need the name"),
        ('command = "a \'b"\n' + SLURM, 'command is "a \'b": a quote is not closed'),
        ('command = "a \'b"\n' + KUBERNETES, 'command is "a \'b": a quote is not closed'),
        ("command = 'a \\'\n" + SLURM, "nothing stands behind the last backslash"),
        ("command = ' '\n" + SLURM, "command is ' ': it has no word"),
        (SLURM + "[step.train]\ncommand = '\"'\n", "[step.train] command is '\"': a quote is not closed"),
        (KUBERNETES + "[step.train]\ncommand = '\"'\n", "[step.train] command is '\"': a quote is not closed"),
        (SLURM + "UID = 3\n", "[env] UID is set by the job itself; leave it out"),
        (SLURM + "SLURM_JOB_ID = 3\n", "[env] SLURM_JOB_ID is set by the job itself; leave it out"),
        (KUBERNETES + "[env]\nNNODES = 3\n", "[env] NNODES is set by the job itself; leave it out"),
        (KUBERNETES + "[env]\nPET_NNODES = 3\n", "[env] PET_NNODES is set by the job itself; leave it out"),
        (
            SLURM.replace("/lustre/me/slipway.sqsh", "~/slipway.sqsh"),
            "image is '~/slipway.sqsh'; it must be the whole path",
        ),
        (SLURM.replace("/lustre/me/slipway.sqsh", "jobs/slipway.sqsh"), "it must be the whole path of a squashfs file"),
        (SLURM + "[step.import]\nimage = '$IMAGE'\n", "[step.import] image is '$IMAGE'; it must be the whole path"),
        (SLURM + "RANDOM = 3\n", "[env] RANDOM is set by the job itself; leave it out"),
        (SLURM + "[sbatch]\nversion = true\n", "[sbatch] version: `slipway submit` sets this flag itself"),
        (
            KUBERNETES.replace("/shared", "/tmp/"),
            "a mount has the target /tmp, where every pod has a folder of its own",
        ),
        (KUBERNETES + "[node_selector]\n'x y' = 'a'\n", "[node_selector] 'x y' = 'a' is no label of a node"),
        (KUBERNETES + "[node_selector]\ngpu = 'ü'\n", "[node_selector] 'gpu' = 'ü' is no label of a node"),
        (KUBERNETES + "[node_selector]\ngpu = '" + "a" * 64 + "'\n", "is no label of a node"),
        (KUBERNETES + "queue = 'A B'\n", "queue is 'A B'; it must be a name of Kubernetes"),
        (KUBERNETES + f"queue = '{'a' * 64}'\n", "it must be a name of Kubernetes, of at most 63 characters"),
        (KUBERNETES + "namespace = 'a.b'\n", "namespace is 'a.b'; it must be a name of Kubernetes without"),
        (KUBERNETES + "secrets = 'a..b'\n", "secrets is 'a..b'; it must be a name of Kubernetes"),
        (KUBERNETES.replace("claim:", "a..b:"), "mount of 'a..b'; it must be the name of a claim, or CLAIM/FOLDER"),
        (KUBERNETES.replace("claim:", "claim/../x:"), "mount 'claim/../x:/shared': write it without .."),
        (KUBERNETES.replace("claim:", "claim//x:"), "mount of 'claim//x'; it must be the name of a claim"),
        (SLURM.replace(":/shared", ":/shared/../x"), "mount '/lustre/me:/shared/../x': write it without .."),
        (KUBERNETES + "[node_selector]\n'A_b!/x' = 'y'\n", "[node_selector] 'A_b!/x' = 'y' is no label of a node"),
        (KUBERNETES + "[node_selector]\n'a/b/c' = 'y'\n", "[node_selector] 'a/b/c' = 'y' is no label of a node"),
        (KUBERNETES + "[node_selector]\n'/x' = 'y'\n", "[node_selector] '/x' = 'y' is no label of a node"),
        (
            KUBERNETES + "[limits]\n'nvidia.com/gpu' = 4\n",
            "[limits] nvidia.com/gpu: give it with the key `gpus_per_node`",
        ),
        (KUBERNETES + "[limits]\n'rdma/-hca' = 4\n", "[limits] 'rdma/-hca' is nothing that a pod can ask for"),
        (KUBERNETES + "[limits]\n'kubernetes.io/x' = 4\n", "'kubernetes.io/x' is nothing that a pod can ask for"),
        (KUBERNETES + "[limits]\nhugepages-big = 4\n", "'hugepages-big' is nothing that a pod can ask for"),
        (
            KUBERNETES.replace("slipway:1", "slip way"),
            "image is 'ghcr.io/org/slip way'; pods need the name of an image",
        ),
        (KUBERNETES.replace("org", "Org"), "image is 'ghcr.io/Org/slipway:1'; pods need the name of an image"),
        (KUBERNETES.replace("ghcr", "https://ghcr"), "image is 'https://ghcr.io/org/slipway:1'; pods need"),
        (KUBERNETES.replace(":1", "@sha256:12"), "image is 'ghcr.io/org/slipway@sha256:12'; pods need"),
        (SLURM.replace("/lustre/me/slipway.sqsh", "./slipway.sqsh"), "it must be the whole path of a squashfs file"),
        (SLURM.replace("/lustre/me/slipway.sqsh", "ghcr.io/Org/x"), "image is 'ghcr.io/Org/x'; it must be the whole"),
        ("time = '٣0:00:00'\n" + SLURM, "time is '٣0:00:00'; write it as 24:00:00"),
        ("time = '2-0'\nstop_before = 65536\n" + SLURM, "stop_before is 65536 s; Slurm takes 65535 s at most"),
        (SLURM + "[sbatch]\ntasks-per-node = 2\n", "[sbatch] tasks-per-node: `slipway submit` sets this flag itself"),
        (SLURM + "[sbatch]\nntasks_per_gpu = 1\n", "[sbatch] ntasks_per_gpu: `slipway submit` sets this flag itself"),
        (SLURM.replace('"login"', '"[2001:db8::5]"'), "host is '[2001:db8::5]'; it must be what `ssh` calls the login"),
        (SLURM.replace('"login"', '"2001:db8::5:x"'), "write ssh://USER@HOST:PORT"),
        (KUBERNETES + "[limits]\nhugepages-2Mi = '4Mi'\n", "[limits] hugepages-2Mi needs cpu or memory beside it"),
        (
            "job_dir = '/x'\n[step.train]\nimage = '/a.sqsh'\n",
            "[step.train] image has no meaning without an image for all steps, of which the mounts are",
        ),
        (SLURM + "[step.train]\ncpus = 3\n", "with exclusive = false give cpus-per-gpu in [step.train.sbatch]"),
        (SLURM + "[sbatch]\ngpus = 4\n", "[sbatch] gpus: give it with the key `gpus_per_node`"),
        (SLURM + "[sbatch]\nclusters = 'b'\n", "[sbatch] clusters: give it with the key `host`"),
        (SLURM + "[sbatch]\nmem_per_gpu = '1G'\nmem-per-gpu = '2G'\n", "[sbatch] mem-per-gpu is there twice"),
    ],
)
def test_what_a_file_cannot_be_is_said_in_one_line(tmp_path, text, said):
    with pytest.raises(UsageError) as error:
        read(tmp_path, text)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_secret_is_never_shown(tmp_path):
    with pytest.raises(UsageError) as error:
        read(tmp_path, SLURM + 'HF_TOKEN = "hf_verysecret"\n')
    assert "hf_verysecret" not in str(error.value)


def test_what_only_looks_like_a_secret_may_be_set(tmp_path):
    names = ["TOKENIZERS_PARALLELISM", "NCCL_IB_HCA", "PYTORCH_ALLOC_CONF", "KEYS", "MAX_TOKENS"]
    lab = read(tmp_path, SLURM + "".join(f'{name} = "1"\n' for name in names))
    assert set(names) < lab.env.keys()


def test_a_variable_and_a_label_may_be_empty(tmp_path):
    assert read(tmp_path, SLURM + "https_proxy = ''\n").env["https_proxy"] == ""
    lab = read(tmp_path, KUBERNETES + "[node_selector]\n'node-role.kubernetes.io/gpu' = ''\n[env]\nA = ''\n")
    assert lab.node_selector == {"node-role.kubernetes.io/gpu": ""} and lab.env == {"A": ""}


@pytest.mark.parametrize(
    "image",
    [
        "slipway",
        "localhost:5000/a/b_c:V1.0-x",
        "a.b#c/d",
        f"10.0.0.1:5000/a--b@sha256:{'0' * 64}",
        f"docker://ghcr.io/org/slipway:1@sha512:{'f' * 128}",
    ],
)
def test_images_have_every_name_that_registries_have(tmp_path, image):
    assert read(tmp_path, KUBERNETES.replace("ghcr.io/org/slipway:1", image)).own.image == image
    assert read(tmp_path, SLURM.replace("/lustre/me/slipway.sqsh", image)).own.image == image
    assert read(tmp_path, SLURM.replace("/lustre/me/slipway.sqsh", "me@ghcr.io#org/slipway")).own.image


@pytest.mark.parametrize("host", ["me@login", "2001:db8::5", "me@fe80::1%eth0", "::1", "ssh://me@[2001:db8::5]:22"])
def test_a_login_node_is_called_as_ssh_calls_it(tmp_path, host):
    assert read(tmp_path, SLURM.replace('"login"', f'"{host}"')).own.host == host


def test_a_file_of_windows_is_read(tmp_path):
    (tmp_path / "lab.toml").write_bytes(codecs.BOM_UTF8 + SLURM.strip().replace("\n", "\r\n").encode())
    assert settings.read(tmp_path / "lab.toml", WHOLE).own == read(tmp_path, SLURM).own


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match=r"there is no .*lab\.toml; name the file of your cluster with --cluster"):
        settings.read(tmp_path / "lab.toml", WHOLE)


def test_steps_have_what_they_need_and_may_have_their_own(tmp_path):
    lab = read(tmp_path, SLURM + "[sbatch]\nconstraint = 'h100'\n[step.import]\npartition = 'cpu'\n"
               "[step.import.sbatch]\nconstraint = 'cpu'\nmem = '100G'\n[step.train]\ntime = '4:00:00'\n")  # fmt: skip
    train, converts = lab.of("train", True), lab.of("import", False)
    assert (train.nodes, train.gpus_per_node, train.time) == (5, 8, "4:00:00")
    assert (converts.nodes, converts.gpus_per_node, converts.partition) == (1, 0, "cpu")
    assert lab.flags_of("train") == {"constraint": "h100"}
    assert lab.flags_of("import") == {"constraint": "cpu", "mem": "100G"}


@pytest.mark.parametrize(
    "time, seconds",
    [("90", 5400), ("90:30", 5430), ("1:30:00", 5400), ("1-12", 129_600), ("1-12:30", 131_400), ("1-0:0:5", 86_405)],
)
def test_slurms_times(time, seconds):
    assert settings.seconds(time) == seconds


def test_paths_of_containers_are_those_of_the_machines_by_the_longest_mount(tmp_path):
    lab = read(tmp_path, SLURM)
    assert lab.on_the_host("/shared/run") == "/lustre/me/run" and lab.on_the_host("/nemo") == "/lustre/me/nemo"
    assert lab.on_the_host("/nemotron") is None and lab.on_the_host("/") is None


# The pattern of a quantity in the schemas of JobSet and of Kubeflow's Trainer.
OF_THE_SCHEMA = (
    r"^(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))))?$"
)
QUANTITIES = [
    "64Gi",
    "1.5Ti",
    ".5",
    "1.",
    "500m",
    "100k",
    "1e3",
    "2E",
    "12E+2",
    "0",
    "64GB",
    "1 Ti",
    "64gi",
    "",
    "x",
    "1K",
]


@pytest.mark.parametrize("value", QUANTITIES)
def test_a_quantity_is_what_the_schemas_take(tmp_path, value):
    text = KUBERNETES + f"shared_memory = '{value}'\n[limits]\nmemory = '{value}'\nhugepages-2Mi = '4Mi'\n"
    if re.fullmatch(OF_THE_SCHEMA, value):
        assert read(tmp_path, text).limits["memory"] == value
    else:
        with pytest.raises(UsageError, match="shared_memory is"):
            read(tmp_path, text)
