"""The step of `step_time.py` in PyTorch, on networks with the same weights.

The script imports it where torch is installed.
"""

import copy
import tempfile
from collections.abc import Sequence

import distil_step
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional

from kd_jax import models


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
  return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


class Block(nn.Module):
  """Two convolutions and what goes around them."""

  def __init__(self, inputs: int, width: int, stride: int):
    super().__init__()
    self.conv1 = _conv(inputs, width, 3, stride)
    self.bn1 = nn.BatchNorm2d(width)
    self.conv2 = _conv(width, width, 3)
    self.bn2 = nn.BatchNorm2d(width)
    self.downsample = nn.Identity()
    if stride > 1 or inputs != width:
      self.downsample = nn.Sequential(
        _conv(inputs, width, 1, stride), nn.BatchNorm2d(width)
      )

  def forward(self, x):
    y = torch.relu(self.bn1(self.conv1(x)))
    return torch.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class ResNet(nn.Module):
  """`models.CifarResNet` of basic blocks, by torchvision's names."""

  def __init__(self, depth: int, width: int, stem: int):
    super().__init__()
    self.conv1, self.bn1 = _conv(3, stem, 3), nn.BatchNorm2d(stem)
    made = stem
    for stage in (1, 2, 3):
      wide, blocks = width * 2 ** (stage - 1), []
      for block in range((depth - 2) // 6):
        stride = 2 if stage > 1 and block == 0 else 1
        blocks.append(Block(made, wide, stride))
        made = wide
      setattr(self, f'layer{stage}', nn.Sequential(*blocks))
    self.fc = nn.Linear(made, distil_step.CLASSES)

  def forward(self, x):
    x = torch.relu(self.bn1(self.conv1(x)))
    x = self.layer3(self.layer2(self.layer1(x)))
    return self.fc(x.mean((2, 3)))


def twins(
  shapes: Sequence[Sequence[int]], problem: distil_step.Problem
) -> tuple[distil_step.Problem, list[ResNet]]:
  """Teacher and student with random weights, and the problem with these.

  Args:
    shapes: depth, width and stem of each.
    problem: its networks have these shapes.

  Returns:
    The problem whose variables are those of the networks, and the networks.
  """
  torch.manual_seed(0)
  networks = [ResNet(*shape) for shape in shapes]

  def variables(network, like):
    with tempfile.TemporaryDirectory() as directory:
      path = f'{directory}/weights.safetensors'
      safetensors.torch.save_file(network.state_dict(), path)
      shape = problem.batch['image'].shape[1:]
      return models.load_pretrained(path, like, input_shape=shape)

  problem = problem._replace(
    taught=variables(networks[0], problem.teacher),
    start=variables(networks[1], problem.student),
  )
  return problem, networks


def way(
  networks: Sequence[ResNet],
  problem: distil_step.Problem,
  *,
  compiled: bool = False,
) -> distil_step.Way:
  """Training of a copy of the student of `twins`.

  Args:
    networks: teacher and student.
    problem: the batch and the recipe.
    compiled: whether by `torch.compile`.
  """
  place = {
    'device': 'cuda' if torch.cuda.is_available() else 'cpu',
    'memory_format': torch.channels_last,
  }
  teacher, learner = (copy.deepcopy(n).to(**place) for n in networks)
  teacher.eval(), learner.train()
  batch, recipe = problem.batch, problem.recipe
  image = torch.from_numpy(batch['image']).permute(0, 3, 1, 2).to(**place)
  label = torch.from_numpy(batch['label']).long().to(place['device'])
  decayed = [p for p in learner.parameters() if p.ndim > 1]
  others = [p for p in learner.parameters() if p.ndim == 1]
  optimizer = torch.optim.SGD(
    [{'params': decayed, 'weight_decay': recipe.decay}, {'params': others}],
    lr=recipe.rate,
    momentum=recipe.momentum,
  )

  def loss_of(image, label):
    with torch.no_grad():
      target = functional.softmax(teacher(image) / recipe.temperature, 1)
    logits = learner(image)
    log_p = functional.log_softmax(logits / recipe.temperature, 1)
    kl = functional.kl_div(log_p, target, reduction='batchmean')
    ce = functional.cross_entropy(logits, label)
    return recipe.kd * recipe.temperature**2 * kl + recipe.ce * ce

  loss_fn = torch.compile(loss_of) if compiled else loss_of

  def once():
    optimizer.zero_grad()
    loss = loss_fn(image, label)
    loss.backward()
    optimizer.step()
    return loss.detach()

  return distil_step.ready(once, lambda loss: float(loss.cpu()))
