"""Whether a file of weights is whole, by what it says of itself or by its publisher's hash."""

import hashlib

import torch
from safetensors.torch import save_file

from pipeline.url_weights import known_sha256, why_not_whole


def test_what_is_whole(tmp_path):
    zipped, named = tmp_path / "w.pt", tmp_path / "w.safetensors"
    torch.save({"x": torch.zeros(100)}, zipped)
    save_file({"x": torch.zeros(100)}, named)
    for file in (zipped, named):
        data = file.read_bytes()
        assert why_not_whole(file) == ""
        for size in (0, 5, 30, len(data) // 2, len(data) - 1):
            file.write_bytes(data[:size])
            assert why_not_whole(file) != "", size
    named.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    for url in (f"https://openaipublic/{digest}/w.pt", f"https://mlfoundations/w-{digest[:8]}.pt"):
        assert why_not_whole(named, known_sha256(url)) == ""
    assert why_not_whole(named, known_sha256("https://mlfoundations/w-0123abcd.pt")) != ""


def test_a_page_kept_for_weights_is_told_from_a_pickle_of_before(tmp_path):
    file = tmp_path / "w.pt"
    torch.save({"x": torch.zeros(3)}, file, _use_new_zipfile_serialization=False)
    assert why_not_whole(file) == ""
    file.write_text("<html>Please log in</html>")
    assert "is no file of weights" in why_not_whole(file)
