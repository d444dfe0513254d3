"""What ranks say about themselves, through storage: events for the record, heartbeats for whoever watches them."""

from pipeline.telemetry.events import Event, EventReader, EventWriter
from pipeline.telemetry.heartbeat import Beat, Heartbeat, Status

__all__ = ["Beat", "Event", "EventReader", "EventWriter", "Heartbeat", "Status"]
