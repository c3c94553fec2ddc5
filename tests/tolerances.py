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

# The same of DEIS, whose coefficients diffusers finds as differences of antiderivatives, each some sigma / L
# with L, 0.15 to 0.4, the logarithm of the ratio of neighbouring sigmas: rounded by 2 EPS32 each, times alpha
# up to 24 EPS32 of what a coefficient multiplies. Two coefficients in each of 19 steps add up as a random
# walk: sqrt(38) * 24. Seen: 86 with the logarithms that NumPy has for AVX-512.
SAMPLER_RUN_DEIS = 148 * EPS32

# The tiny checkpoint's latents against diffusers' own pipeline, both in fp32, relative L2. A U-Net's own
# error is 9 EPS32 (see OTHER_BATCH), and SAMPLER_RUN a run's; guidance of 7.5 multiplies the former by at
# most 14. Zero terminal SNR begins with x sigma_max = 4096 times as large as it ends: 4 roundings of that.
# Seen: 1.9e-5.
SCHEDULER_RUN = (64 + 14 * 9 + 4 * 4096) * EPS32

# Euler's timesteps, absolute. diffusers finds them in a float32 table of log sigma: 1 ulp of sigma and
# the logarithm's rounding, 2 EPS32 each, over the table's smallest slope, 0.0031; then it rounds them
# (half a spacing below 1024). Seen: 8.2e-5.
SAMPLER_TIMESTEPS = 4 * EPS32 / 0.0031 + 2.0**-15

# The order of convergence seen between 50 steps and 200 (for PLMS 250 and 1000): what the error's next term
# leaves, a few times 1/50 of the error. Seen: 0.18. A wrong order would be 1 off.
SAMPLER_ORDER = 0.25

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
# u + w (c - i) + v (i - u), as a share of |u| + w (|c| + |i|) + v (|i| + |u|): one more sum.
PICTURE_GUIDANCE = 4.001 * EPS32

# guidance_rescale's factor, relative, given the guided prediction in float32: it is rounded once. The float64
# sums of 2**14 numbers (72 additions in a row) err by 3 * 72 * 2**-53 of the sum of squares, which is at most
# 2**14 times the scatter that is left of it: 0.007 EPS32, twice, and halved by the root.
RESCALE_FACTOR = 1.01 * EPS32

# Its product with the guided prediction, relative, and what products of these errors add.
RESCALE_PRODUCT = 1.001 * EPS32

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

# The blend of guided_step, mask x + (1 - mask) (SIGNAL known + NOISE noise), against float64, as a share of
# its terms' sizes: the coefficient's float32 1 EPS32, its product 1, the inner sum 1, 1 - mask 1, its product
# 1, the outer sum 1: 6, and what EPS32 squared adds.
BLEND = 6.001 * EPS32

# One attention on ONNX Runtime against its definition, float32, relative L2. The logits (sums of 16 products,
# up to 5 in size) err by some 5 sqrt(16) EPS32, which the exponential makes relative: 20; the scale's two
# factors are rounded (2 EPS32 of logits of 5: 10); normalising and the sum over 5 keys add 5.
ATTENTION_FP32 = 35 * EPS32

# The same in fp16 with a float32 softmax: scaled queries and keys (2 roundings each, with the factors of the
# scale) and logits are rounded, each an error of EPS16 relative to logits of up to 5: sqrt(5) * 5 = 11; the
# weights and the result add 2.
ATTENTION_FP16 = 13 * EPS16

# The kernel philox_normal on a GPU against NumPy, absolute, of values up to PHILOX_RADIUS. CUDA's double log
# and sin err by at most 2 of their ulps, so rounded to float32 each is NumPy's number or, next to a tie, its
# neighbour: 2 EPS32 of the sine, and half as much of the radius through the root of the logarithm, and the
# roundings of the root and of the product may then differ: 2 EPS32 each.
PHILOX_ON_GPU = 7 * PHILOX_RADIUS * EPS32

# philox_normal's kernel against NumPy, relative. Both take the logarithm and the sine in float64, each to 2
# ulps (CUDA guide; libm), and round to float32: the results part where a rounding boundary lies between, 4 of
# 2**29 float64 numbers for each function, 2**-26 of all; 2**20 are compared, so more than 2 unequal ones are
# as likely as 2**-20. Such a one is off by 2 EPS32 (halved by the root for the logarithm), and root and
# product round anew, by 2 EPS32 each.
PHILOX_KERNEL_UNEQUAL = 2
PHILOX_KERNEL = 6 * EPS32

# A chain of three fp16 operations against the same with some of them in float32, relative L2: one rounding of
# each operation's result and one of each input that is cast.
ISLAND_FP16 = 6 * EPS16

# The tiny VAE's decoder in fp16 against the same graph in float32, relative L2: 60 roundings, each EPS16 of
# its tensor, which normalisation carries on undamped and which add as squares: sqrt(60) = 8.
ISLAND_VAE_FP16 = 8 * EPS16

# A tensor's largest magnitude in two runs of one float32 graph that differ in the order of sums, relative to
# it: as GRAPH_FP32, and an element near the largest errs by as much as the largest.
RANGE = 2 * GRAPH_FP32

# A component in fp16 before and after the passes, relative L2. Attentions change; each of the U-Net's
# eight adds up to 13 EPS16 (ATTENTION_FP16) to a tensor of which it is some tenth, as squares: 1.3 sqrt(8).
# A normalisation with its SiLU in one node rounds once, not three times: each of the 21 errs by some EPS16 in
# a branch that is a third of what it is added to, sqrt(21) / 3. As squares: 4. Seen: 1.4 for the U-Net, 1.7
# and less for the others.
PASSES_FP16 = 4 * EPS16

# The error of one normalisation against its analysis (export/parity/rounding.py), which gives a standard
# deviation: a single draw is within three of them.
NORM_DRAW = 3

# Group normalisation of up to 100 numbers of mean 3 and deviation 2 in float32, relative L2: mean and
# variance err by sqrt(100) EPS32 of numbers up to 1.8 times the deviation, twice; subtraction, root, quotient
# and the affine part add 6.
GROUP_NORM = 42 * EPS32

# A whole run of a sampler's table against diffusers with float64 in place of its float32, so formula
# against formula: as SAMPLER_RUN, in 2**-53, times the 500 by which a rounding error of the largest x
# (sigma_max = 14.6) counts where it is divided by the lowest sigma (0.029). Seen: 8.7e-13.
SAMPLER_FORMULAS = 64 * 500 * 2.0**-53

# The quantiles of the beta distribution against SciPy's, which promises 10 units in the last place.
BETA_QUANTILE = 20 * 2.0**-53

# alphas_cumprod rescaled to zero terminal SNR, absolute: PyTorch's square root is off by 1 ulp at times,
# which turns up as independent roundings, 2 EPS32, of a thousand factors. Seen: 7e-8.
ALPHAS_CUMPROD_ZERO_SNR = 1000**0.5 * 2 * EPS32

# The error of the variance that a stochastic sampler leaves with the exact model of a Gaussian: that of 200
# steps as a share of that of 50. First order is 0.25; seen: 0.29. What does not converge has 1.
SAMPLER_VARIANCE = 0.4

# SDXL, four guided DDIM steps through the runtime against diffusers' pipeline, over the largest latent. One
# evaluation of a tiny network is 15 EPS32 from PyTorch's (seen, GRAPH_FP32), guidance of 4 weighs the halves
# by 4 and 3, and four steps add up: 15 * 7 * 4. Seen: 18. What the arguments change is 380,000 and more.
SDXL_RUN = 420 * EPS32

# clip_pixels against transformers' CLIPImageProcessor, absolute, after the same resize in uint8 (one level of
# which would be 1 / 255 / 0.28 = 0.014). Both round x / 255, then the difference and the quotient, each to
# float32: 3 EPS32 of values up to 1 for the first two, over a std of at least 0.26, and of results up to 2.3
# for the last: (2 / 0.26 + 2.3) EPS32 for each of the two sides. Seen: 0.
CLIP_PIXELS = 2 * 10 * EPS32

# masked_image against diffusers' pipelines, absolute, of values up to 1: x / 127.5 - 1 rounds twice, and so
# does their 2 (x / 255) - 1; quotients are up to 2 and round by 2 EPS32, differences by 1: 3 for each side.
MASKED_IMAGE = 6 * EPS32

# A flat block of a JPEG of quality 100 without subsampling, levels of 255. Rounding Y, Cb and Cr moves blue
# by 0.5 + 1.772 * 0.5, the DC coefficient's step of 1, an eighth of a level, by 0.17, and blue is rounded at
# the end by 0.5: 2.06, to which the transform's fixed point adds less than 0.5. Levels are whole numbers.
JPEG_FLAT = 2

# A preview's level before it is rounded, of 255, float32 against float64: four products and as many sums,
# each EPS32 of terms that add up to 5 at most, times 127.5; the shift and the scale round levels up to 255.
PREVIEW_LEVEL = (8 * 5 * 127.5 + 2 * 255) * EPS32

# Text embeddings with weights or blended, float32, relative L2: GRAPH_FP32 of the states, and the error of
# the two means whose quotient is a factor. Each is of n numbers (1232 and more), so its error is 1/sqrt(n) of
# GRAPH_FP32 times the numbers' size, of which the mean of the tiny networks is a hundredth and more.
WEIGHTED_TEXT = GRAPH_FP32 * (1 + 2**0.5 * 100 / 1232**0.5)

# guidance_embedding against diffusers', absolute, in units of the largest angle, 1000 w. Both compute in
# float32: an exponent e up to 9.2 with 3 roundings makes the angle 1000 w exp(-e) err by 3 e exp(-e) EPS32 of
# it, at most 1.1; exponential, scale and product round 3 times: 4.1 for each of the two. Sine and cosine add
# 1 EPS32 each. Seen: 3.2.
GUIDANCE_EMBEDDING = 9 * EPS32

# Four DDIM steps of a loop around the wrapped U-Net against diffusers' own pipeline, both PyTorch in float32
# on the same numbers, relative L2: the guidance's sum (3 roundings, weighted by up to 5) and the order of
# sums can differ; as ONNX Runtime and PyTorch differ by 15 EPS32 in one evaluation (GRAPH_FP32): 15 * 5 * 4.
# Seen: 2.1. Another guidance embedding makes 180,000, mask and masked latents the other way round 3,400,000.
UNET_LOOP = 300 * EPS32

# How much of the variance of the embedded model's pictures the preview map must explain at the latents' size.
# The best affine map for these very pictures explains 0.86, the mean colour 0; the map is fitted to others.
# Seen: 0.84.
PREVIEW_EXPLAINED = 0.75

# SDXL's refiner alone or after a base, ten steps on ONNX Runtime against diffusers' pipelines, over the
# largest latent: as SDXL_RUN, with ten steps in place of four: 15 * 7 * 10. What a score or the last steps'
# guidance change is 10 times that and more.
REFINER_RUN = 1050 * EPS32

# Pictures beside diffusers', decibels: what the project promises for every kind of checkpoint.
PICTURE_PSNR = 50.0

# A task on ONNX Runtime against diffusers' pipeline of that task, over the largest latent. One evaluation of
# a tiny network is 15 EPS32 from PyTorch's (seen, GRAPH_FP32), guidance of 3 weighs the halves by 3 and 2,
# and five steps add up: 15 * 5 * 5; a picture's latents are off by an evaluation more. Seen: 16.
TASK_RUN = 390 * EPS32

# A tiny component in fp16 whose arithmetic is float32 (OpenVINO) against fp16 arithmetic (ONNX Runtime),
# relative L2: the latter errs by some 3 EPS16 (FRACTIONAL_TIMESTEP_FP16), the output's rounding adds 1.
FP16_IN_FLOAT32 = 4 * EPS16

# A whole run of any task and sampler on ONNX Runtime against diffusers' pipeline with a generator of its own,
# relative L2: as TASK_RUN, and the generators' numbers may differ by TORCH_CPU_NORMAL_OTHER_BUILD. What the
# project promises is 2e-3. Seen: 17 EPS32. A draw too many or too few makes 6,000,000, the posterior's mean
# in place of its draw 1,400,000.
SAME_SEED = TASK_RUN + TORCH_CPU_NORMAL_OTHER_BUILD

# A tiny checkpoint's picture from an fp16 bundle against diffusers in float32, of levels up to 1. The latents
# of a sampling run in fp16 are 4e-4 off (the parity figures), the decoder adds 3e-4 of a picture whose root
# mean square is some 0.3, and pixels are rounded: (0.29 / 255)² = 1.3e-6 against (5e-4 * 0.3)² = 2e-8: 59 dB.
# What fp16 could cost at most, 300 roundings (8.5e-3 of the picture, with guidance 3.6e-2), would be 39 dB.
FP16_PSNR_DB = 50.0

# A table's coefficients on another CPU, against max(1, the coefficient): NumPy's float64 logarithms and
# exponentials err by 1 to 4 ulps (2**-52 each), and differences of logarithms and the solution of up to three
# equations, where a step is shorter than its neighbours, multiply that by up to some 50. Seen between AVX-512
# and no vector units: 2**-51.
GOLDEN_COEFFICIENT = 2.0**-44

# A tensor with a LoRA merged into it against its formula in float64, relative to the largest number. Products
# are rounded once, factors of LoKr and LoHa twice more, scale, product with it and sum once each: 6 EPS32.
# DoRA rounds the changed tensor (2), lengths and quotient, takes the tensor away, adds it (3): 9. It does it
# to numbers up to 6 times the largest of the result, where what was changed is longer than it becomes.
LORA_FORMULA = 54 * EPS32
