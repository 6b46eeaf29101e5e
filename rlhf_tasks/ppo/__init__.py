"""PPO: rollout, experience, optimization, and the pure maths beneath them. Imports torch and transformers only."""
