//! What a retrofit keeps: tasks with answers that can be checked.
//!
//! [`tasks`] makes and scores long-context prompts.

pub mod tasks;
