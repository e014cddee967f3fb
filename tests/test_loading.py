"""Loading models: what is there loads alike in every way, what is not says what to do."""

import json
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import load_file, save_file

from hauberk import loading
from hauberk.errors import CannotLoad
from hauberk.loading import load_model
from hauberk.requests import respond


@pytest.fixture
def folder(lab_folder, tmp_path):
    """A copy of the tiny model, to be damaged."""
    return shutil.copytree(lab_folder, tmp_path / "model")


def texts(model, processor, requests):
    return [r.text for r in respond(model, processor, requests, max_new_tokens=6)]


@pytest.mark.parametrize(
    "device_map", [None, "cpu", "auto", "balanced", "sequential", {"": "cpu"},
                   {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu",
                    "model.language_model": "cpu", "lm_head": "cpu"}],
    ids=str,
)  # fmt: skip
def test_a_model_answers_alike_however_it_is_spread(tiny, lab_folder, device_map):
    model, processor = load_model(lab_folder, device_map=device_map)
    assert not model.training
    requests = [*tiny.pictured[:3], tiny.plain[0]]
    assert texts(model, processor, requests) == texts(tiny.model, tiny.processor, requests)


def test_the_dtype_is_that_of_the_file_or_the_one_asked_for(lab_folder, folder):
    assert load_model(lab_folder)[0].dtype == torch.float32
    half = load_model(lab_folder, dtype="bfloat16")[0]
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    half.save_pretrained(folder)
    assert load_model(str(folder))[0].dtype == torch.bfloat16


def test_attention_is_the_one_asked_for(lab_folder):
    model, _ = load_model(lab_folder, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


def test_weights_in_several_files_are_one_model_and_a_missing_one_is_named(tiny, folder):
    (folder / "model.safetensors").unlink()
    tiny.model.save_pretrained(folder, max_shard_size="200KB")
    shards = sorted(path.name for path in folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    request = tiny.pictured[:1]
    assert texts(*load_model(folder), request) == texts(tiny.model, tiny.processor, request)
    (folder / shards[1]).unlink()
    with pytest.raises(CannotLoad, match=f"missing {shards[1]}; download the model again"):
        load_model(folder)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CannotLoad, match=r"index\.json: no index of weights"):
        load_model(folder)


# --- arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "told"), [
    ({"dtype": "fp16"}, "dtype 'fp16' is unknown; known are auto, float32, bfloat16, float16"),
    ({"device_map": "everywhere"}, "device_map 'everywhere' is unknown; known are auto,"),
    ({"device_map": {"": "gpu"}}, "device_map 'gpu' is unknown"),
    ({"device_map": "cpu:3"}, "names 'cpu:3', but there are 1 devices of type cpu"),
    ({"quantization": "2bit"}, "quantization '2bit' is unknown; known are 4bit, 8bit"),
    ({"attn_implementation": "nonsense"}, "nonsense"),
])  # fmt: skip
def test_an_argument_that_is_wrong_says_what_is_right(lab_folder, arguments, told):
    with pytest.raises(CannotLoad, match=told):
        load_model(lab_folder, **arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_missed_before_anything_is_read(tmp_path, device):
    with pytest.raises(CannotLoad, match=f"names '{device}', but there are 0 devices of type cuda"):
        load_model(tmp_path, device_map=device)


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantization_without_its_library_or_a_gpu_says_what_to_do(
    lab_folder, monkeypatch, quantization
):
    found = loading.find_spec
    monkeypatch.setattr(loading, "find_spec", lambda n: None if n == "bitsandbytes" else found(n))
    with pytest.raises(CannotLoad, match=r"needs bitsandbytes.*`pip install bitsandbytes`"):
        load_model(lab_folder, quantization=quantization)
    monkeypatch.setattr(loading, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(CannotLoad, match="needs a GPU, and none is visible"):
        load_model(lab_folder, quantization=quantization)


def test_spreading_without_accelerate_says_what_to_install(lab_folder, monkeypatch):
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(CannotLoad, match=r"needs accelerate.*`pip install accelerate`"):
        load_model(lab_folder, device_map="auto")


# --- checkpoints ------------------------------------------------------------------------------


def test_all_that_a_folder_lacks_is_told_at_once(tmp_path):
    with pytest.raises(CannotLoad) as caught:
        load_model(tmp_path)
    for name in ("config.json", "*.safetensors", "tokenizer.json", "processor_config.json"):
        assert name in str(caught.value)


@pytest.mark.parametrize(("lost", "told"), [
    ("config.json", r"missing config\.json"), ("model.safetensors", r"missing weights"),
    ("tokenizer.json", "missing a tokenizer"), ("processor_config.json", "missing a processor"),
])  # fmt: skip
def test_a_file_that_a_folder_lacks_is_named(folder, lost, told):
    (folder / lost).unlink()
    with pytest.raises(CannotLoad, match=rf"{folder}: {told}.*download the model again"):
        load_model(folder)


def test_pickled_weights_are_not_read(tiny, folder):
    (folder / "model.safetensors").unlink()
    torch.save(tiny.model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(CannotLoad, match=r"pytorch_model\.bin is a pickle, which is not read"):
        load_model(folder)


def test_a_pickle_beside_whole_weights_is_no_cure_for_another_file(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CannotLoad, match=r"missing a tokenizer.*download the model again"):
        load_model(folder)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", "~/nowhere", "sp ace"])
def test_what_can_only_be_a_folder_is_looked_for_nowhere_else(name):
    with pytest.raises(CannotLoad, match=r"no such folder; put config\.json, weights"):
        load_model(name)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"{}"])
def test_a_config_that_is_none_is_refused(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CannotLoad, match=str(folder)):
        load_model(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, -200])
def test_weights_cut_short_are_refused(folder, kept):
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[:kept])
    with pytest.raises(CannotLoad, match=r"cannot be loaded.*check that its files are whole"):
        load_model(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "processor_config.json"])
def test_a_damaged_processor_is_refused(folder, name):
    (folder / name).write_text("{")
    with pytest.raises(CannotLoad, match="cannot be loaded"):
        load_model(folder)


def test_weights_that_would_be_random_are_refused_and_those_without_a_place_are_told(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if "q_proj" in name)
    save_file(weights | {"extra.bias": torch.zeros(3)}, path, {"format": "pt"})
    with pytest.warns(UserWarning, match="no place for 1 of the weights, 'extra.bias' first"):
        load_model(folder)
    save_file({k: v for k, v in weights.items() if k != name}, path, {"format": "pt"})
    with pytest.raises(CannotLoad, match=r"1 weights are missing.*would be random"):
        load_model(folder)
    save_file(weights | {name: torch.zeros(3, 3)}, path, {"format": "pt"})
    with pytest.raises(CannotLoad, match="cannot be loaded"):
        load_model(folder)


def change(folder, **changed):
    path = folder / "config.json"
    content = json.loads(path.read_text()) | changed
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def test_code_of_a_checkpoint_is_not_run(folder):
    (folder / "modeling.py").write_text("raise SystemExit('run')")
    code = {"AutoConfig": "modeling.Config", "AutoModelForImageTextToText": "modeling.Model"}
    change(folder, model_type="my_vlm", auto_map=code)
    with pytest.raises(CannotLoad, match=r"'my_vlm' needs code that comes with.*not run"):
        load_model(folder)


def test_an_architecture_that_nobody_knows_is_named(folder):
    change(folder, model_type="my_vlm")
    with pytest.raises(CannotLoad, match=r"knows no model_type 'my_vlm'; install a newer one"):
        load_model(folder)


def test_a_model_that_looks_at_nothing_is_refused(folder):
    change(folder, model_type="llama")
    with pytest.raises(CannotLoad, match="'llama' reads text alone"):
        load_model(folder)


# --- the hub ----------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on loopback that answers every request with one status and error code."""
    import huggingface_hub.constants as constants

    class Answer(BaseHTTPRequestHandler):
        status, code = 500, ""

        def do_HEAD(self):
            self.send_response(self.status)
            self.send_header("X-Error-Code", self.code)
            self.send_header("X-Error-Message", "no")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_GET(self):
            self.do_HEAD()

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield Answer
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(("status", "code", "told"), [
    (403, "GatedRepo", "accept them at https://huggingface.co/org/model.*hf auth login"),
    (404, "RepoNotFound", "neither a folder here nor a model on the hub that you may see"),
    (404, "RevisionNotFound", "no revision 'v9'"),
])  # fmt: skip
def test_what_the_hub_refuses_is_said_with_its_cure(hub, status, code, told):
    hub.status, hub.code = status, code
    with pytest.raises(CannotLoad, match=f"org/model: .*{told}"):
        load_model("org/model", revision="v9")


def test_a_hub_that_is_gone_is_as_good_as_none(hub, monkeypatch):
    import huggingface_hub.constants as constants

    template = "http://127.0.0.1:9/{repo_id}/{revision}/{filename}"  # nothing listens there
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the hub's client tries again
    with pytest.raises(CannotLoad, match="the hub cannot be reached; put config"):
        load_model("org/model")


def test_without_a_network_one_message_says_which_files_to_bring(monkeypatch, tmp_path):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CannotLoad, match="neither a folder here nor in the cache") as caught:
        load_model("org/model")
    for name in ("config.json", "*.safetensors", "tokenizer.json", "`hf download org/model`"):
        assert name in str(caught.value)
