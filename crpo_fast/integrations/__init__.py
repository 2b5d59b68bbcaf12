"""The fused loss and stage entropy inside other trainers; each module needs that trainer."""
