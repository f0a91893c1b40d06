"""A server of a multimodal checkpoint, which reads texts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.models.multimodal_folders import model_of, multimodal_folder, tokenizer_of

TEXTS = ["one root grows under the tree", "one root grows under the house"]


@pytest.mark.anyio
async def test_embeddings(running, tmp_path) -> None:
    async with running(multimodal_folder(tmp_path, "gemma3")) as (client, _):
        response = await client.post("/embed", json={"inputs": TEXTS})
        info = (await client.get("/info")).json()
    assert response.status_code == 200, response.text
    trunk = model_of("gemma3").base_model
    with torch.no_grad():
        hidden = [trunk(torch.tensor(tokenizer_of()(text)["input_ids"])[None]).last_hidden_state[0] for text in TEXTS]
    expected = torch.nn.functional.normalize(torch.stack([rows[-1] for rows in hidden]), dim=-1)
    np.testing.assert_allclose(np.asarray(response.json()), expected.numpy(), atol=1e-5)
    assert "embedding" in info["model_type"]
