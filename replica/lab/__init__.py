"""The lab: the product's core in the simulator's world, drawn, told and attacked, beside systems that do less."""
