"""Weights of PyTorch: the same weights give the same outputs.

The twins are built of torch.nn with the structure and the names that
torchvision, timm and RepDistiller publish, and with random weights and
statistics. `.ci/run` sets KD_JAX_REQUIRE_PARITY, so that a stack that shall
have torch does not skip this file.
"""

import os

import jax
import numpy as np
import pytest

from kd_jax import adapters, models

if os.environ.get('KD_JAX_REQUIRE_PARITY'):
  import torch
else:
  torch = pytest.importorskip('torch')

import safetensors.flax
import safetensors.torch
from torch import nn

# These programs run once: to compile them is what takes time.
COMPILER = {'xla_backend_optimization_level': 0}


def _conv(inputs, outputs, size, stride=1, groups=1, bias=False):
  return nn.Conv2d(
    inputs, outputs, size, stride, size // 2, groups=groups, bias=bias
  )


# --- ResNet, torchvision's names


class Basic(nn.Module):
  expansion = 1

  def __init__(self, inputs, width, stride):
    super().__init__()
    self.conv1 = _conv(inputs, width, 3, stride)
    self.bn1 = nn.BatchNorm2d(width)
    self.conv2 = _conv(width, width, 3)
    self.bn2 = nn.BatchNorm2d(width)
    self.downsample = _downsample(inputs, width, stride)

  def forward(self, x):
    y = torch.relu(self.bn1(self.conv1(x)))
    return torch.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class Bottle(nn.Module):
  expansion = 4

  def __init__(self, inputs, width, stride):
    super().__init__()
    self.conv1 = _conv(inputs, width, 1)
    self.bn1 = nn.BatchNorm2d(width)
    self.conv2 = _conv(width, width, 3, stride)
    self.bn2 = nn.BatchNorm2d(width)
    self.conv3 = _conv(width, 4 * width, 1)
    self.bn3 = nn.BatchNorm2d(4 * width)
    self.downsample = _downsample(inputs, 4 * width, stride)

  def forward(self, x):
    y = torch.relu(self.bn1(self.conv1(x)))
    y = torch.relu(self.bn2(self.conv2(y)))
    return torch.relu(self.bn3(self.conv3(y)) + self.downsample(x))


def _downsample(inputs, outputs, stride):
  if inputs == outputs and stride == 1:
    return nn.Identity()
  return nn.Sequential(
    _conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)
  )


class ResNet(nn.Module):
  def __init__(self, block, blocks, width, classes, imagenet):
    super().__init__()
    self.conv1 = _conv(3, width, *((7, 2) if imagenet else (3, 1)))
    self.bn1 = nn.BatchNorm2d(width)
    self.pool = nn.MaxPool2d(3, 2, 1) if imagenet else nn.Identity()
    self.stages, inputs = len(blocks), width
    for i, count in enumerate(blocks):
      layer = nn.Sequential()
      for j in range(count):
        stride = 2 if i and not j else 1
        layer.append(block(inputs, width * 2**i, stride))
        inputs = width * 2**i * block.expansion
      self.add_module(f'layer{i + 1}', layer)
    self.fc = nn.Linear(inputs, classes)

  def forward(self, x):
    x = self.pool(torch.relu(self.bn1(self.conv1(x))))
    for i in range(self.stages):
      x = getattr(self, f'layer{i + 1}')(x)
    return self.fc(x.mean((2, 3)))


# --- VGG, RepDistiller's names and torchvision's


class VGG(nn.Module):
  """With `flat`, layers and poolings are one sequence, `features`."""

  def __init__(self, stages, width, classes, flat):
    super().__init__()
    self.flat, inputs = flat, 3
    self.features = nn.Sequential()
    for i, count in enumerate(stages):
      outputs = width * (1, 2, 4, 8, 8)[i]
      block = self.features if flat else nn.Sequential()
      for _ in range(count):
        block.append(_conv(inputs, outputs, 3, bias=True))
        block.append(nn.BatchNorm2d(outputs))
        block.append(nn.ReLU())
        inputs = outputs
      if flat:
        block.append(nn.MaxPool2d(2) if i < 3 else nn.Identity())
      else:
        self.add_module(f'block{i}', block)
    self.classifier = nn.Linear(inputs, classes)

  def forward(self, x):
    if self.flat:
      x = self.features(x)
    else:
      for i in range(5):
        x = getattr(self, f'block{i}')(x)
        x = nn.functional.max_pool2d(x, 2) if i < 3 else x
    return self.classifier(x.mean((2, 3)))


# --- MobileNets


def _conv_norm_relu6(inputs, outputs, size, stride=1, groups=1):
  return nn.Sequential(
    _conv(inputs, outputs, size, stride, groups),
    nn.BatchNorm2d(outputs),
    nn.ReLU6(),
  )


# expansion, channels at width 0.25 in multiples of 8, blocks, stride
V2 = (
  (1, 8, 1, 1),
  (6, 8, 2, 2),
  (6, 8, 3, 2),
  (6, 16, 4, 2),
  (6, 24, 3, 1),
  (6, 40, 3, 2),
  (6, 80, 1, 1),
)


class InvertedResidual(nn.Module):
  def __init__(self, inputs, outputs, stride, expansion):
    super().__init__()
    inner = inputs * expansion
    self.conv = nn.Sequential()
    if expansion != 1:
      self.conv.append(_conv_norm_relu6(inputs, inner, 1))
    self.conv.append(_conv_norm_relu6(inner, inner, 3, stride, inner))
    self.conv.append(_conv(inner, outputs, 1))
    self.conv.append(nn.BatchNorm2d(outputs))
    self.residual = stride == 1 and inputs == outputs

  def forward(self, x):
    return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
  """torchvision's names."""

  def __init__(self, classes):
    super().__init__()
    self.features = nn.Sequential(_conv_norm_relu6(3, 8, 3, 2))
    inputs = 8
    for expansion, outputs, blocks, stride in V2:
      for i in range(blocks):
        self.features.append(
          InvertedResidual(inputs, outputs, 1 if i else stride, expansion)
        )
        inputs = outputs
    self.features.append(_conv_norm_relu6(inputs, 1280, 1))
    self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))

  def forward(self, x):
    return self.classifier(self.features(x).mean((2, 3)))


class Separable(nn.Module):
  """timm's names; either an activation ends it or it may be residual."""

  def __init__(self, inputs, outputs, stride, relu):
    super().__init__()
    self.conv_dw = _conv(inputs, inputs, 3, stride, inputs)
    self.bn1 = nn.BatchNorm2d(inputs)
    self.conv_pw = _conv(inputs, outputs, 1)
    self.bn2 = nn.BatchNorm2d(outputs)
    self.last = nn.ReLU6() if relu else nn.Identity()
    self.residual = stride == 1 and inputs == outputs and not relu

  def forward(self, x):
    y = nn.functional.relu6(self.bn1(self.conv_dw(x)))
    y = self.last(self.bn2(self.conv_pw(y)))
    return x + y if self.residual else y


class TimmInverted(nn.Module):
  def __init__(self, inputs, outputs, stride, expansion):
    super().__init__()
    inner = inputs * expansion
    self.conv_pw = _conv(inputs, inner, 1)
    self.bn1 = nn.BatchNorm2d(inner)
    self.conv_dw = _conv(inner, inner, 3, stride, inner)
    self.bn2 = nn.BatchNorm2d(inner)
    self.conv_pwl = _conv(inner, outputs, 1)
    self.bn3 = nn.BatchNorm2d(outputs)
    self.residual = stride == 1 and inputs == outputs

  def forward(self, x):
    y = nn.functional.relu6(self.bn1(self.conv_pw(x)))
    y = nn.functional.relu6(self.bn2(self.conv_dw(y)))
    y = self.bn3(self.conv_pwl(y))
    return x + y if self.residual else y


class TimmMobileNet(nn.Module):
  """MobileNetV1 (`version` 1) or V2 at width 0.25, timm's names."""

  def __init__(self, version, classes):
    super().__init__()
    self.conv_stem = _conv(3, 8, 3, 2)
    self.bn1 = nn.BatchNorm2d(8)
    self.blocks = nn.Sequential()
    v1 = ((1, 16, 1, 1), (1, 32, 2, 2), (1, 64, 2, 2))
    v1 += ((1, 128, 6, 2), (1, 256, 2, 2))
    inputs = 8
    for expansion, outputs, count, stride in v1 if version == 1 else V2:
      stage = nn.Sequential()
      for i in range(count):
        shape = (inputs, outputs, 1 if i else stride)
        if expansion == 1:
          stage.append(Separable(*shape, relu=version == 1))
        else:
          stage.append(TimmInverted(*shape, expansion))
        inputs = outputs
      self.blocks.append(stage)
    self.has_last = version == 2
    if self.has_last:
      self.conv_head = _conv(inputs, 1280, 1)
      self.bn2 = nn.BatchNorm2d(1280)
      inputs = 1280
    self.classifier = nn.Linear(inputs, classes)

  def forward(self, x):
    x = self.blocks(nn.functional.relu6(self.bn1(self.conv_stem(x))))
    if self.has_last:
      x = nn.functional.relu6(self.bn2(self.conv_head(x)))
    return self.classifier(x.mean((2, 3)))


# --- ViT and DeiT, timm's names


class Attention(nn.Module):
  def __init__(self, width, heads):
    super().__init__()
    self.heads = heads
    self.qkv = nn.Linear(width, 3 * width)
    self.proj = nn.Linear(width, width)

  def forward(self, x):
    batch, length, width = x.shape
    qkv = self.qkv(x).reshape(batch, length, 3, self.heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    self.scores = q @ k.transpose(-1, -2) / (width // self.heads) ** 0.5
    x = (self.scores.softmax(-1) @ v).transpose(1, 2)
    return self.proj(x.reshape(batch, length, width))


class Mlp(nn.Module):
  def __init__(self, width):
    super().__init__()
    self.fc1 = nn.Linear(width, 4 * width)
    self.fc2 = nn.Linear(4 * width, width)

  def forward(self, x):
    return self.fc2(nn.functional.gelu(self.fc1(x)))


class Block(nn.Module):
  def __init__(self, width, heads):
    super().__init__()
    self.norm1 = nn.LayerNorm(width, eps=1e-6)
    self.attn = Attention(width, heads)
    self.norm2 = nn.LayerNorm(width, eps=1e-6)
    self.mlp = Mlp(width)

  def forward(self, x):
    x = x + self.attn(self.norm1(x))
    return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
  def __init__(self, patch, width):
    super().__init__()
    self.proj = nn.Conv2d(3, width, patch, patch)

  def forward(self, x):
    return self.proj(x).flatten(2).transpose(1, 2)


class ViT(nn.Module):
  def __init__(self, patches, patch, width, depth, heads, classes, distilled):
    super().__init__()
    self.patch_embed = PatchEmbed(patch, width)
    self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
    if distilled:
      self.dist_token = nn.Parameter(torch.zeros(1, 1, width))
      self.head_dist = nn.Linear(width, classes)
    length = patches + 1 + distilled
    self.pos_embed = nn.Parameter(torch.zeros(1, length, width))
    self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(depth)])
    self.norm = nn.LayerNorm(width, eps=1e-6)
    self.head = nn.Linear(width, classes)
    self.distilled = distilled

  def forward(self, x):
    x = self.patch_embed(x)
    tokens = [self.cls_token]
    tokens += [self.dist_token] if self.distilled else []
    tokens = [t.expand(len(x), -1, -1) for t in tokens]
    x = torch.cat([*tokens, x], 1) + self.pos_embed
    x = self.norm(self.blocks(x))
    self.logits = self.head(x[:, 0])
    if not self.distilled:
      return self.logits
    self.logits_dist = self.head_dist(x[:, 1])
    return (self.logits + self.logits_dist) / 2


# --- ConvNeXt


class ChannelNorm(nn.LayerNorm):
  """LayerNorm over the channels of `[B, C, H, W]`."""

  def forward(self, x):
    return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Permute(nn.Module):
  def __init__(self, *order):
    super().__init__()
    self.order = order

  def forward(self, x):
    return x.permute(self.order)


class ConvNeXtBlock(nn.Module):
  """torchvision's names, or timm's."""

  def __init__(self, width, timm):
    super().__init__()
    self.timm = timm
    conv = _conv(width, width, 7, groups=width, bias=True)
    norm = nn.LayerNorm(width, eps=1e-6)
    if timm:
      self.conv_dw, self.norm, self.mlp = conv, norm, Mlp(width)
      self.gamma = nn.Parameter(torch.zeros(width))
      return
    self.block = nn.Sequential(
      conv,
      Permute(0, 2, 3, 1),
      norm,
      nn.Linear(width, 4 * width),
      nn.GELU(),
      nn.Linear(4 * width, width),
      Permute(0, 3, 1, 2),
    )
    self.layer_scale = nn.Parameter(torch.zeros(width, 1, 1))

  def forward(self, x):
    if not self.timm:
      return x + self.layer_scale * self.block(x)
    y = self.mlp(self.norm(self.conv_dw(x).permute(0, 2, 3, 1)))
    return x + (y * self.gamma).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
  """torchvision's names."""

  def __init__(self, blocks, widths, classes):
    super().__init__()
    self.features = nn.Sequential()
    for i, (count, width) in enumerate(zip(blocks, widths, strict=True)):
      norm = ChannelNorm(widths[max(i - 1, 0)], eps=1e-6)
      shrink = nn.Conv2d(3, width, 4, 4)
      if i:
        shrink = nn.Conv2d(widths[i - 1], width, 2, 2)
      pair = (norm, shrink) if i else (shrink, norm)
      self.features.append(nn.Sequential(*pair))
      self.features.append(
        nn.Sequential(*[ConvNeXtBlock(width, False) for _ in range(count)])
      )
    self.classifier = nn.Sequential(
      nn.LayerNorm(widths[-1], eps=1e-6),
      nn.Flatten(),
      nn.Linear(widths[-1], classes),
    )

  def forward(self, x):
    return self.classifier(self.features(x).mean((2, 3)))


class TimmStage(nn.Module):
  def __init__(self, inputs, width, count):
    super().__init__()
    self.downsample = nn.Identity()
    if inputs:
      self.downsample = nn.Sequential(
        ChannelNorm(inputs, eps=1e-6), nn.Conv2d(inputs, width, 2, 2)
      )
    self.blocks = nn.Sequential(
      *[ConvNeXtBlock(width, True) for _ in range(count)]
    )

  def forward(self, x):
    return self.blocks(self.downsample(x))


class TimmConvNeXt(nn.Module):
  def __init__(self, blocks, widths, classes):
    super().__init__()
    self.stem = nn.Sequential(
      nn.Conv2d(3, widths[0], 4, 4), ChannelNorm(widths[0], eps=1e-6)
    )
    inputs = (0, *widths)
    self.stages = nn.Sequential(
      *[TimmStage(inputs[i], widths[i], n) for i, n in enumerate(blocks)]
    )
    self.head = nn.Sequential()
    self.head.add_module('norm', nn.LayerNorm(widths[-1], eps=1e-6))
    self.head.add_module('fc', nn.Linear(widths[-1], classes))

  def forward(self, x):
    return self.head(self.stages(self.stem(x)).mean((2, 3)))


# --- the comparisons

VIT = {'width': 24, 'depth': 3, 'heads': 3}
CONVNEXT = {'blocks': (1, 2, 2, 1), 'widths': (8, 12, 16, 24)}
# name: the twin, our model, the side of the images in pixels
PAIRS = {
  'resnet18': (
    lambda: ResNet(Basic, (2, 2, 2, 2), 8, 5, imagenet=True),
    models.ImageNetResNet(5, blocks=(2, 2, 2, 2), width=8),
    64,
  ),
  # The maps' sides are odd, where paddings on the wrong side show.
  'bottleneck': (
    lambda: ResNet(Bottle, (1, 2, 1, 1), 8, 5, imagenet=True),
    models.ImageNetResNet(5, blocks=(1, 2, 1, 1), bottleneck=True, width=8),
    75,
  ),
  'resnet20_cifar': (
    lambda: ResNet(Basic, (3, 3, 3), 16, 5, imagenet=False),
    models.CifarResNet(5, depth=20),
    32,
  ),
  'resnet50_cifar': (
    lambda: ResNet(Bottle, (1, 2, 1, 1), 8, 5, imagenet=False),
    models.CifarBottleneckResNet(5, blocks=(1, 2, 1, 1), width=8),
    16,
  ),
  'vgg8': (
    lambda: VGG((1, 1, 1, 1, 1), 8, 5, flat=False),
    models.VGG(5, depth=8, width=8),
    32,
  ),
  'vgg13': (
    lambda: VGG((2, 2, 2, 2, 2), 4, 5, flat=False),
    models.VGG(5, depth=13, width=4),
    32,
  ),
  'vgg16_features': (
    lambda: VGG((2, 2, 3, 3, 3), 4, 5, flat=True),
    models.VGG(5, depth=16, width=4),
    32,
  ),
  'mobilenet_v1_timm': (
    lambda: TimmMobileNet(1, 5),
    models.MobileNetV1(5, width=0.25, relu6=True),
    64,
  ),
  'mobilenet_v2': (
    lambda: MobileNetV2(5),
    models.MobileNetV2(5, width=0.25),
    65,
  ),
  'mobilenet_v2_timm': (
    lambda: TimmMobileNet(2, 5),
    models.MobileNetV2(5, width=0.25),
    64,
  ),
  'vit': (
    lambda: ViT(12, 8, 24, 3, 3, 5, distilled=False),
    models.ViT(5, patch_size=8, **VIT),
    (32, 24),
  ),
  'deit_distilled': (
    lambda: ViT(16, 8, 24, 3, 3, 5, distilled=True),
    models.ViT(5, patch_size=8, distilled=True, **VIT),
    32,
  ),
  'convnext': (
    lambda: ConvNeXt(classes=5, **CONVNEXT),
    models.ConvNeXt(5, **CONVNEXT),
    64,
  ),
  'convnext_timm': (
    lambda: TimmConvNeXt(classes=5, **CONVNEXT),
    models.ConvNeXt(5, **CONVNEXT),
    64,
  ),
}


def _randomise(twin):
  """Weights and statistics unlike those of a new network."""
  generator = torch.Generator().manual_seed(0)
  for name, x in twin.state_dict().items():
    if name.endswith('num_batches_tracked'):
      continue
    noise = torch.randn(x.shape, generator=generator)
    if name.endswith('running_var'):
      x.copy_(torch.exp(0.5 * noise))
    elif name.endswith(('token', 'pos_embed')):
      x.copy_(noise)
    elif x.ndim in (2, 4):
      x.copy_(noise * (2 / x[0].numel()) ** 0.5)
    else:
      x.copy_(0.3 * noise + (not name.endswith(('bias', 'running_mean'))))


def _pair(name, tmp_path):
  """A twin in evaluation mode, our model, its loaded variables, images."""
  make, model, size = PAIRS[name]
  shape = (*((size, size) if isinstance(size, int) else size), 3)
  twin = make().eval().requires_grad_(False)
  _randomise(twin)
  path = tmp_path / 'weights.safetensors'
  safetensors.torch.save_file(twin.state_dict(), path)
  variables = models.load_pretrained(path, model, input_shape=shape)
  images = np.random.default_rng(0).normal(size=(3, *shape)).astype('f')
  return twin, model, variables, images


def _apply(model, variables, images, taps=()):
  forward = jax.jit(adapters.from_linen(model, taps=taps))
  compiled = forward.lower(variables, {'image': images}).compile(COMPILER)
  return jax.device_get(compiled(variables, {'image': images}))


def _difference(ours, theirs):
  """The largest difference, relative to the size of their values."""
  theirs = theirs.numpy()
  assert ours.shape == theirs.shape
  return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize('name', PAIRS)
def test_a_twin_with_the_same_weights_has_the_same_outputs(name, tmp_path):
  twin, model, variables, images = _pair(name, tmp_path)
  theirs = twin(torch.from_numpy(images).permute(0, 3, 1, 2))
  ours = _apply(model, variables, images).output
  # Images differ, and so do their outputs: nothing is saturated.
  assert theirs.std(0).mean() > 1e-2 * theirs.abs().max()
  assert _difference(ours, theirs) < 1e-4
  init = jax.eval_shape(model.init, jax.random.key(0), images)
  assert jax.tree.structure(init) == jax.tree.structure(variables)


def test_bottlenecks_of_repdistiller_have_names_of_their_own(tmp_path):
  _, model, variables, images = _pair('resnet50_cifar', tmp_path)
  (path,) = tmp_path.glob('*.safetensors')
  theirs = {
    name.replace('downsample', 'shortcut').replace('fc.', 'linear.'): array
    for name, array in safetensors.flax.load_file(path).items()
  }
  assert {'linear.bias', 'layer1.0.shortcut.1.weight'} <= set(theirs)
  safetensors.flax.save_file(theirs, path)
  again = models.load_pretrained(path, model, input_shape=images.shape[1:])
  jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_scores_and_both_heads_are_those_of_the_twin(tmp_path):
  twin, model, variables, images = _pair('deit_distilled', tmp_path)
  twin(torch.from_numpy(images).permute(0, 3, 1, 2))
  scores = [f'block{i}/attention/scores' for i in (1, 2, 3)]
  taps = [*scores, 'head', 'head_dist']
  features = _apply(model, variables, images, taps).features
  for tap, block in zip(scores, twin.blocks, strict=True):
    assert _difference(features[tap], block.attn.scores) < 1e-4
  assert _difference(features['head'], twin.logits) < 1e-4
  assert _difference(features['head_dist'], twin.logits_dist) < 1e-4


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_files_become_float32(dtype, tmp_path):
  twin = PAIRS['vit'][0]()
  _randomise(twin)
  state = {k: v.to(dtype) for k, v in twin.state_dict().items()}
  path = tmp_path / 'weights.safetensors'
  safetensors.torch.save_file(state, path)
  model = PAIRS['vit'][1]
  params = models.load_pretrained(path, model, input_shape=(32, 24, 3))[
    'params'
  ]
  assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype('float32')}
  expected = state['head.weight'].float().numpy().T
  np.testing.assert_array_equal(params['head']['kernel'], expected)
