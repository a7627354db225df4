"""The replica in veRL's own registry, in an actor of Ray's; where both are installed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from foundry.errors import InvalidArgument
from tests.contract.rollout.server import Rollout
from tests.contract.rollout.test_verl_server import IDS, named

pytest.importorskip("verl")
ray: Any = pytest.importorskip("ray")

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def started() -> Iterator[None]:
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    yield
    ray.shutdown()


@pytest.fixture
async def replica(started: None, rollout: Rollout) -> AsyncIterator[Any]:
    from verl.workers.rollout.replica import RolloutReplica, get_rollout_replica_class

    import foundry.adapters.verl as adapter

    found = get_rollout_replica_class(adapter.NAME)
    assert issubclass(found, RolloutReplica)
    made = found(0, config(rollout, addresses=[rollout.address]), None, gpus_per_node=1)
    await made.init_standalone()
    yield made
    ray.kill(made.server_handle)


def config(rollout: Rollout, **foundry: Any) -> Any:
    from verl.workers.config import RolloutConfig

    foundry = {"model_fingerprint": rollout.lm.spec.fingerprint, "timeout_seconds": 20.0, **foundry}
    return RolloutConfig(
        name="foundry",
        prompt_length=64,
        response_length=6,
        tensor_model_parallel_size=1,
        custom={"foundry": foundry},
    )


async def test_verls_client_gets_its_own_output(replica: Any, rollout: Rollout) -> None:
    from verl.workers.rollout.replica import TokenOutput

    cartridge = rollout.publish(seed=1, version=4)
    await replica.set_policy(named(cartridge), 9)
    sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0, "logprobs": True}
    # As its LLMServerClient calls.
    answer = await replica.server_handle.generate.remote(
        request_id="a", prompt_ids=IDS, sampling_params=sampling, image_data=None, video_data=None
    )
    assert isinstance(answer, TokenOutput)
    assert len(answer.token_ids) == len(answer.log_probs) > 0
    assert answer.extra_fields["global_steps"] == 9
    assert answer.extra_fields["cartridge_digest"] == cartridge.digest
    assert replica.server_address == rollout.address


async def test_what_it_tells_every_replica_is_taken(replica: Any) -> None:
    await replica.wake_up()
    await replica.sleep()
    await replica.clear_kv_cache()
    await replica.release_kv_cache()
    await replica.resume_kv_cache()
    await replica.abort_all_requests(reject_request=True)
    await replica.resume_generation()
    await replica.start_profile(role="a")
    await replica.stop_profile()


async def test_a_replica_without_a_server_is_refused(started: None, rollout: Rollout) -> None:
    from foundry.adapters.verl import FoundryReplica

    wrong: list[dict[str, Any]] = [{"addresses": []}, {"adresses": ["a:1"]}]
    for foundry in wrong:
        replica = FoundryReplica(0, config(rollout, **foundry), None, gpus_per_node=1)
        with pytest.raises(InvalidArgument, match="addresses"):
            await asyncio.wait_for(replica.init_standalone(), 10)
