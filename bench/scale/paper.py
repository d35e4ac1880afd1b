"""The model on paper: a pass over 1e9 latents of 16,384 numbers by H200s. Nothing here was run.

Rates and where they are from:
    memory    4,256 GB/s, read and written by a copy, as measured on an H200 (2026-11-26)
    products  724 TFLOP/s of bfloat16, measured in the same run; float32's accuracy takes three of
              them, as a float32 number is the sum of three of bfloat16
    141 GB    of memory; a node has eight GPUs, 2 TB of memory, eight 3.84 TB NVMe drives and eight
              ports of 400 Gb/s InfiniBand: NVIDIA's DGX BasePOD reference architecture, "Core
              Components" (DGX H200)
    63 GB/s   from a node's memory to each GPU (PCIe 5.0, 16 lanes) and 900 GB/s of NVLink in both
              directions: H200-SXM-141GBx8_TRT_MaxQ.json, NVIDIA's description of its system for
              MLPerf Inference 4.1, which has 504 GB/s for eight GPUs
    6.5 GB/s  a drive: Samsung's announcement of the PM9A3, U.2, PCIe 4.0
"""

from __future__ import annotations

import math
from typing import NamedTuple

from . import model

N, D = 10**9, 16_384
FILE_BYTES = 1 << 34  # of a shard
NODE = 8  # GPUs
USABLE = 0.9  # of a GPU's or node's memory
MEMORY, PRODUCTS = 4256e9, 724e12 / 3
NVLINK, INFINIBAND = 450e9, 50e9  # one direction, a GPU
LATENCY = 1e-5  # of a message, assumed; it decides nothing here


class Store(NamedTuple):
    """Where the atoms lie: bytes that a GPU has of it, and its rate."""

    name: str
    capacity: float
    rate: float


STORES = (
    Store("GPU memory", USABLE * 141e9, MEMORY),
    Store("host memory", USABLE * 2e12 / NODE, 63e9),
    Store("NVMe", 3.84e12, 6.5e9),
)


def needed(store: Store, itemsize: int) -> int:
    """GPUs, in whole nodes, that hold all latents."""
    return NODE * math.ceil(itemsize * N * D / store.capacity / NODE)


def seconds(store: Store, itemsize: int, gpus: int, B: int) -> tuple[float, float]:
    """(a pass without messages, its messages)."""
    files = math.ceil(itemsize * N * D / FILE_BYTES)
    work = model.Pass(N, D, itemsize, B, ranks=gpus, files=files)
    link = NVLINK if gpus <= NODE else INFINIBAND
    has = model.Machine(MEMORY, PRODUCTS, store=store.rate, link=link, latency=LATENCY)
    alone = model.floor(work, model.Machine(MEMORY, PRODUCTS, store=store.rate))
    return alone, model.floor(work, has) - alone


def free_queries(store: Store, itemsize: int) -> float:
    """Up to this many queries a pass takes no longer than one with a single query."""
    return model.compute_bound_from(itemsize, min(store.rate, MEMORY), PRODUCTS)
