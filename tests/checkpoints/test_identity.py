"""What tells a model's weights from others."""

import torch

from hf_layershuffle.checkpoints.identity import weights_digest


def test_the_digest_of_weights_does_not_depend_on_how_they_are_read(vit):
    model = vit.classifier(hidden_size=256, intermediate_size=1024)  # large enough for several threads
    digests, threads = set(), torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            digests.add(weights_digest(model))
    finally:
        torch.set_num_threads(threads)
    assert len(digests) == 1
    with torch.no_grad():  # which a sum would not tell
        weight = model.classifier.weight
        weight[0], weight[1] = weight[1].clone(), weight[0].clone()
    assert weights_digest(model) not in digests
