"""A reference evaluator of Core ML's MIL programs, in numpy.

It reads a saved ``.mlpackage`` back, weights included, and computes what the program says,
operator by operator. It is no Core ML: it has no compiler, no device and no speed. What it
shows is that the file holds the right graph with the right weights.

How numbers are treated, exactly:

- Every value has the dtype that the program declares for it: float16 tensors are float16.
- An operator with float inputs is computed in float32: inputs are widened, the whole operator
  (a convolution, a layer normalisation, one softmax) is computed, and the result is rounded to
  the declared dtype, once, to the nearest, ties to even. A float16 overflow is infinity.
- Compressed weights (``constexpr_*``) are decompressed when the program is loaded, by
  coremltools' own code.

Core ML's engines may accumulate in float16 within an operator, or fuse operators and round less
often; neither is imitated.
"""
