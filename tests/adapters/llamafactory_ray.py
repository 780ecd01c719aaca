"""Started by a test: a run of LLaMA-Factory in a Ray worker, `python llamafactory_ray.py run.json PORT`."""

import json
import sys
from pathlib import Path

import ray
from llamafactory.train.tuner import Worker

if __name__ == "__main__":
    config = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    # what the host gives its workers
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[2]}
    variables = {**place, "TORCHELASTIC_USE_AGENT_STORE": "False"}
    ray.init(num_cpus=1, include_dashboard=False)
    worker = ray.remote(Worker).options(num_cpus=1, runtime_env={"env_vars": variables}).remote()
    ray.get(worker._training_function.remote(config={"args": config, "callbacks": []}))
    ray.shutdown()
