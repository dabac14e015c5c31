"""The kernels' own PTX, executed on the CPU with every access checked: what Triton compiles for a
GPU is proven without one.

- `parse`: a module's text -> basic blocks of instructions;
- `arithmetic`: what an instruction without memory computes;
- `memory`: tensors and shared memory, and what may not be asked of them;
- `tensor_cores`: ldmatrix, mma, wgmma;
- `machine`: all threads of a grid, block by block;
- `launch`: Triton's launcher with this machine in the place of a GPU;
- `exact`: the partial sums that the kernels must give, bit for bit.

Not modelled: memory ordering weaker than a barrier, overlap of asynchronous copies, tcgen05.
ex2.approx and div.full are computed exactly (hardware: 2 units in the last place).
"""
