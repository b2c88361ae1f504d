"""Evaluate a policy of serve_vla.py on the benchmarks of vla-eval: SimplerEnv, CALVIN, LIBERO-Pro, ...

    python serve_vla.py --checkpoint RUN                              # in another terminal
    python examples/vla_eval/server.py configs/benchmarks/calvin/eval.yaml

The YAML is vla-eval's, for one benchmark. Read Forward.predict: an observation goes to /act, and the
gripper of the answer is converted from the numbers of the policy's robot to the benchmark's.
"""

import argparse
import base64
import io
import json
import sys
import urllib.error
import urllib.request

import numpy as np
from PIL import Image
from vla_eval import evaluate
from vla_eval.cli.config_loader import load_config
from vla_eval.model_servers.predict import PredictModelServer

# for each benchmark, its numbers for an open and a closed gripper, as its `step` reads them (what
# get_action_spec declares differs for SimplerEnv)
GRIPPERS = {"libero": (-1, 1), "libero_pro": (-1, 1), "libero_plus": (-1, 1), "libero_mem": (-1, 1),
            "robocerebra": (-1, 1), "robocasa": (-1, 1), "calvin": (1, -1), "vlabench": (1, -1), "simpler": (1, 0),
            "maniskill2": (0, 1)}


class Forward(PredictModelServer):
    """Answers observations with the actions of serve_vla.py."""

    def __init__(self, url: str, unnorm_key: str | None, gripper: tuple[float, float] | None):
        """gripper: the benchmark's numbers for open and closed; None: the policy's are right."""
        self.url = url
        self.gripper = gripper
        self.health = self.ask("/health")
        keys = self.health["unnorm_keys"]
        self.key = unnorm_key or keys[0]
        if self.key not in keys or (unnorm_key is None and len(keys) > 1):
            sys.exit(f"error: --unnorm_key {unnorm_key}: choose one of the policy's: {', '.join(keys)}")
        opened, closed = self.health["gripper"][self.key]
        if gripper and opened == closed:
            sys.exit(f"error: {self.key}: the policy's last number is not a gripper that moves")
        super().__init__(chunk_size=self.health["action_shape"][0])  # all steps of an answer are executed

    def ask(self, path: str, request: dict | None = None):
        """GET, or POST a request."""
        post = urllib.request.Request(self.url + path, request and json.dumps(request).encode())
        try:
            with urllib.request.urlopen(post, timeout=600) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:  # its message names the field and the cure
            raise ValueError(json.load(error)["error"]) from None

    def predict(self, obs: dict, ctx) -> dict:
        """An observation of the benchmark -> {"actions": (action_chunk, 7) or (7,)}."""
        views = [jpeg(view) for view in obs["images"].values()]  # the scene's camera comes first
        request = {"images": views[: self.health["images"]], "instruction": obs["task_description"],
                   "unnorm_key": self.key}
        if self.health["proprio"]:
            request["proprio"] = np.asarray(obs["states"]).tolist()
        actions = np.array(self.ask("/act", request))
        if self.gripper:
            opened, closed = self.health["gripper"][self.key]
            actions[..., -1] = np.interp((actions[..., -1] - closed) / (opened - closed), [0, 1], self.gripper[::-1])
        return {"actions": actions}

    def get_observation_params(self) -> dict:
        """What the benchmark is to send, too."""
        needed = {"send_wrist_image": self.health["images"] > 1, "send_state": self.health["proprio"]}
        return {name: True for name in needed if needed[name]}


def jpeg(view: np.ndarray) -> str:
    """(H, W, 3) uint8 as base64 of a JPEG, as training images are stored."""
    file = io.BytesIO()
    Image.fromarray(view).save(file, "jpeg", quality=95)
    return base64.b64encode(file.getvalue()).decode()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("config", help="a YAML of vla-eval's configs/benchmarks, or your own")
    parser.add_argument("--server", default="http://127.0.0.1:8000", help="where serve_vla.py listens")
    parser.add_argument("--unnorm_key", help="a dataset, if the policy has several")
    parser.add_argument("--gripper", type=float, nargs=2, metavar=("OPEN", "CLOSED"),
                        help="the benchmark's numbers; default: known ones, else the policy's own")
    parser.add_argument("--no_docker", action="store_true", help="the benchmark is installed here")
    args = parser.parse_args()
    config = load_config(args.config)
    for benchmark in config["benchmarks"]:
        params = benchmark.setdefault("params", {})
        if params.get("task_name", "").startswith("google_robot"):
            params.setdefault("gripper_mode", "sticky")  # as SimplerEnv's own loop for this robot
    # vla_eval.benchmarks.NAME.benchmark:CLASS; all of a YAML are of one kind
    name = benchmark["benchmark"].partition(":")[0].removesuffix(".benchmark").rpartition(".")[2]
    gripper = args.gripper or GRIPPERS.get(name)
    policy = Forward(args.server, args.unnorm_key, gripper)
    print(f"benchmark {name} unnorm_key {policy.key} gripper {gripper or 'as the policy'}", flush=True)
    results = evaluate(policy, config, docker=False if args.no_docker else None)
    if errors := sum(result["num_errors"] for result in results):  # they count as failures
        sys.exit(f"error: {errors} episodes were not played to their end: see above")


if __name__ == "__main__":
    main()
