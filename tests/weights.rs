//! Checkpoints: one model in every naming, real files, damaged files, contradicting configurations, and noise.

mod weights_parts;
