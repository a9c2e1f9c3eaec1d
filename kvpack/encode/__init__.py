"""The offline side: quantizers, rate control, the CPU coder and decoder (numba), whole files and models.

Never imports torch or CuPy. The decoder here is the executable specification of the format.
"""
