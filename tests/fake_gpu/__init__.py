"""Run GPU code without a GPU, and watch what it does on the host.

PyTorch's fake tensors have a device and a shape, and no values: a whole training step
on `cuda:0` runs without a kernel, and a dispatch mode sees each of its operations.
What they ask of CUDA itself, streams, events, properties, a stand-in of its runtime
answers, which `build` compiles.
"""
