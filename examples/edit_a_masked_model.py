"""Edit one fact in a masked diffusion model and watch it denoise: python examples/edit_a_masked_model.py
[MODEL HPARAMS]

The defaults run on a laptop CPU. For a real model: GSAI-ML/LLaDA-8B-Instruct hparams/ROME_MDM/llada-8b.yaml,
with a prompt of its world.
"""

import random
import sys

import torch

from easyedit_mdm import decode, load_hparams, load_model, make_edit, score_prompts
from easyedit_mdm.twins.world import World

name, file = (sys.argv[1:] + ["twin-llada", "ROME_MDM/twin-llada"][len(sys.argv) - 1 :])[:2]
model = load_model(name)
world = World.build()
fact = next(f for f in world.all_facts() if f.length == 2 and not f.relation.closed)
request = {
    "prompt": fact.prompt(),
    "subject": fact.subject,
    "target_new": world.other_object(fact, 3, random.Random(0)),
}
if not name.startswith("twin-"):
    request = {
        "prompt": "The mother tongue of Danielle Darrieux is",
        "subject": "Danielle Darrieux",
        "target_new": "Brazilian Portuguese",
    }


def show(title: str) -> None:
    """Print the canvas after every step."""
    prompt = torch.tensor(model.tokenizer(request["prompt"])["input_ids"])
    n_tokens = score_prompts(model, [request["prompt"]], [request["target_new"]])[0]["n_tokens"]
    print(title)
    for frame in decode(model, [prompt], [n_tokens])[0].frames(model.ids.mask):
        print("  ", request["prompt"], model.tokenizer.decode(frame))


edit = make_edit(model, request, load_hparams(file))
show("before")
edit.apply(model)
show(
    f"after writing {request['target_new']!r}, optimised over {edit.card['facts'][0]['schedule']} in"
    f" {edit.card['facts'][0]['steps']} steps"
)
edit.revert(model)
show("taken back")
