"""Token merging in diffusers' UNets and ControlNets."""
