"""Every tolerance of the test suite, with its reason.

A tolerance comes from an error analysis or a measured distribution, never from what would make a test
pass. ``EPS32`` and ``EPS16`` are unit round-offs (half the spacing of 1.0).
"""

EPS32 = 2.0**-24
EPS16 = 2.0**-11

# torch.cuda against philox_normal, as a share of the radius s = sqrt(-2 ln u), at most 6.76. The
# GPU's fast sine errs by 2**-21.41 on [-pi, pi] (CUDA guide, __sinf) and by another 2.2e-7 up to
# 2 pi, where its reduced argument has twice the rounding error; logarithm (1 ulp), root and product
# add 4 EPS32: 8.2e-7 in all. Seen over 176 published numbers: 5.4e-7.
PHILOX_CUDA = 2.0**-20
PHILOX_RADIUS = 6.77

# philox_normal against its formula in float64:
# EPS32 (PHILOX_FLOAT64 s + PHILOX_FLOAT64_NEAR_ONE / s).
# Phase up to 2 pi, in EPS32: word to float32 3.2, phase to float32 4, constant 2.9; sine 1,
# logarithm 1/2, root 1, product 1: 13.6. The roundings of the word and of u move ln u by 2 EPS32
# and s by that over s.
PHILOX_FLOAT64 = 14
PHILOX_FLOAT64_NEAR_ONE = 2

# torch.randn on the CPU, 16 elements and more, x86 with AVX2, relative. Both: root 1, product 1, in
# units of EPS32. Ours: logarithm 1 (halved by the root), sine 1. torch (Cephes): 1.3 (halved), 2.
# Sum 8.2; seen over 2**20 numbers: 5.3.
TORCH_CPU_NORMAL = 9 * EPS32

# The same where torch's build takes the angle in float64 and rounds once: absolute. The angles
# differ by 11 EPS32 (two roundings at 4, the constant's 3), times the largest radius,
# sqrt(-2 ln 2**-24).
TORCH_CPU_NORMAL_OTHER_BUILD = 11 * EPS32 * 5.77

# Below 16 elements both work in float64: the two results may round to neighbouring float32 numbers.
TORCH_CPU_NORMAL_SMALL = 2 * EPS32

# A whole sampling run against diffusers, which rounds its sigmas and the coefficients (and, but for
# DDIM, x) to float32. About 8 roundings a step, adding up over 50 steps as a random walk does: 8 *
# sqrt(50) = 57 EPS32. With two steps of Euler, 4 roundings of numbers sigma_max = 14.6 times the result:
# 58. Seen over 150 runs: 27. (The cosine schedule has sigma_max = 20,000: only where it starts lower.)
SAMPLER_RUN = 64 * EPS32

# The same with diffusers' table widened to float64, 2**29 times finer.
SAMPLER_RUN_FLOAT64 = 64 * 2.0**-53

# Euler's timesteps, absolute. diffusers finds them in a float32 table of log sigma: 1 ulp of sigma and
# the logarithm's rounding, 2 EPS32 each, over the table's smallest slope, 0.0031; then it rounds them
# (half a spacing below 1024). Seen: 8.2e-5.
SAMPLER_TIMESTEPS = 4 * EPS32 / 0.0031 + 2.0**-15

# The error at 50 steps over that at 200, relative to 4**order: what the error's next term leaves, a few
# times 1/50. Seen: 0.08. A wrong order would be 0.75 or 3 off.
SAMPLER_ORDER = 0.15

# alphas_cumprod where PyTorch's CPU build has no FMA, relative: a beta of another last bit can round
# 1 - beta to the neighbouring float32 number (2 EPS32), rarely and either way; the product is rounded.
ALPHAS_CUMPROD_NO_FMA = 8 * EPS32

# sigmas: equal quotients, and roots that PyTorch (MKL) rounds to 1 ulp and NumPy correctly.
SIGMAS = 2 * EPS32

# The embedded model against diffusers, uint8 pictures. The latents differ by some 2e-6 relative (fp32, a few
# hundred roundings), the decoder's output by as much: at most one pixel in 500 then rounds to the neighbour,
# which is 10·log10(255² · 500) = 75 dB. The figure is the one that the project promises.
EMBEDDED_PSNR_DB = 50.0

# guided_step against the float64 recurrence: the error of one term, as a share of its size. The float32
# coefficient 1 EPS32, the product 1, and at most 6 additions after it (A, B0 to B3, E, C): 8, and what
# EPS32 squared adds.
STEP_TERM = 8.001 * EPS32

# Guidance u + w (c - u), as a share of |u| + w (|u| + |c|): difference, product and sum 1 EPS32 each.
GUIDANCE = 3.001 * EPS32

# The bound made of these, over the largest result. A wrong coefficient shifts the result by about itself,
# so 2**-12 tells one from rounding. Computed for all tables: at most 3,600 EPS32 (DPM++ with Karras
# sigmas, guided, where large terms cancel).
STEP_BOUND_IS_TIGHT = 2**12 * EPS32

# One exported graph on ONNX Runtime against PyTorch, both float32, relative L2. Some 300 independent
# roundings grow as their root, normalisation and softmax multiply each by up to 10: sqrt(300) * 10 = 173
# EPS32. Seen on the tiny networks: 15.
GRAPH_FP32 = 173 * EPS32

# The largest error against the largest value, in GRAPH_FP32: a largest of 10**4 Gaussian errors is 4 of
# their standard deviations, and so is the largest value of theirs; attention's tails need room.
GRAPH_PEAK = 4

# What 0.2 of a timestep changes in an fp16 graph's output, against the change in float32, relative L2.
# Each of the two outputs errs by some 3 EPS16 (seen: 1.1), the change is 1.5e-2 of the output:
# sqrt(2) * 3 EPS16 / 1.5e-2 = 0.14. A timestep rounded to fp16 would change nothing: 1.
FRACTIONAL_TIMESTEP_FP16 = 0.14

# An image alone against the same in a batch or on other threads, over its largest latent. Only the order
# of sums inside ONNX Runtime can differ. ONNX Runtime against PyTorch, whose order is different everywhere,
# is 9 EPS32 apart on such a run (the bundle's parity figures); 7 times that. Seen: 0.
OTHER_BATCH = 64 * EPS32

# A whole run of the float32 loop against float64, over the largest latent: as SAMPLER_RUN, about 10
# roundings a step on numbers up to sigma_max = 14.6 times the result. Seen: 5.5 EPS32.
LOOP_RUN = 64 * EPS32
