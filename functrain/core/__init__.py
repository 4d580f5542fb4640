"""The pure floor: trees, losses, gradients, reducers, optimizers and steps, without I/O, clocks or threads."""
