"""Trainers: one loop, one module per method.

from diffalign.trainers import DiffusionDPOConfig, DiffusionDPOTrainer

config = DiffusionDPOConfig(output_dir="outputs/dpo", max_train_steps=500)
DiffusionDPOTrainer(config, model=pipeline_or_path, dataset="my_pairs/").train()
"""

from diffalign.trainers.dcpo import DCPOConfig, DCPOTrainer
from diffalign.trainers.ddo import DDOConfig, DDOTrainer
from diffalign.trainers.diffusion_dpo import DiffusionDPOConfig, DiffusionDPOTrainer
from diffalign.trainers.flow_dpo import FlowDPOConfig, FlowDPOTrainer
from diffalign.trainers.flow_rwr import FlowRWRConfig, FlowRWRTrainer
from diffalign.trainers.kto import DiffusionKTOConfig, DiffusionKTOTrainer
from diffalign.trainers.list_dpo import ListDPOConfig, ListDPOTrainer
from diffalign.trainers.mapo import MaPOConfig, MaPOTrainer
from diffalign.trainers.seppo import SePPOConfig, SePPOTrainer
from diffalign.trainers.sft import SFTConfig, SFTTrainer
from diffalign.trainers.step_aware import StepAwareConfig, StepAwareTrainer

__all__ = [
    "DCPOConfig",
    "DCPOTrainer",
    "DDOConfig",
    "DDOTrainer",
    "DiffusionDPOConfig",
    "DiffusionDPOTrainer",
    "DiffusionKTOConfig",
    "DiffusionKTOTrainer",
    "FlowDPOConfig",
    "FlowDPOTrainer",
    "FlowRWRConfig",
    "FlowRWRTrainer",
    "ListDPOConfig",
    "ListDPOTrainer",
    "MaPOConfig",
    "MaPOTrainer",
    "SePPOConfig",
    "SePPOTrainer",
    "SFTConfig",
    "SFTTrainer",
    "StepAwareConfig",
    "StepAwareTrainer",
]
