"""Ray: replicas of the engine, and judges, as Ray Serve applications. Scheduling, routing and scaling are Ray's."""
