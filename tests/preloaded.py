"""Libraries that services load, for `tests.forked`. Nothing of the foundry: what a service loads is its own affair."""

import fastapi
import grpc.aio
import grpc_health.v1.health
import grpc_reflection.v1alpha.reflection
import obstore
import opentelemetry.trace
import prometheus_client
import pydantic_settings
import redis.asyncio
import rich.console
import structlog
import torch
import transformers.models.llama.modeling_llama
import transformers.models.qwen2.modeling_qwen2
import typer
import uvicorn
from transformers import AutoModelForCausalLM, AutoTokenizer

__all__ = [
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "fastapi",
    "grpc",
    "grpc_health",
    "grpc_reflection",
    "obstore",
    "opentelemetry",
    "prometheus_client",
    "pydantic_settings",
    "redis",
    "rich",
    "structlog",
    "torch",
    "transformers",
    "typer",
    "uvicorn",
]
