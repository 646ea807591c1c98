//! What every back end can do: the same calls on memory of its own space.

use crate::blocks::Align;
use crate::call::{Expand, Forward, RoutingTensors, Shrink};
use crate::dtype::Element;
use crate::error::Result;
use crate::projection::Projection;
use crate::route::Route;
use crate::tensor::{Space, View, ViewMut};
use bytemuck::Pod;

/// Memory that a back end owns.
pub trait Buffer<T: Pod> {
    /// Where the memory lives.
    type Space: Space;
    /// All elements.
    fn view(&self) -> View<'_, Self::Space, T>;
    /// All elements, to be written.
    fn view_mut(&mut self) -> ViewMut<'_, Self::Space, T>;
}

/// A place where calls run: the CPU, or a stream of a GPU.
///
/// Calls are queued in order and may return before their work is done; [`Backend::download`] and
/// [`Backend::synchronize`] wait for it.
pub trait Backend {
    /// Where this back end's memory lives.
    type Space: Space;
    /// Memory that this back end owns.
    type Buffer<T: Pod>: Buffer<T, Space = Self::Space>;
    /// Scratch memory for calls, made once.
    type Workspace;

    /// One word for tables and messages: `cpu`, `cuda`.
    fn name(&self) -> &'static str;

    /// The name and whatever was forced on this back end, for messages: `cuda i64 m32`.
    fn variant(&self) -> String {
        self.name().to_owned()
    }

    /// Copies elements into new memory.
    ///
    /// # Errors
    /// [`crate::Error::Driver`] when there is no room.
    fn upload<T: Pod>(&self, elements: &[T]) -> Result<Self::Buffer<T>>;

    /// Copies elements into a buffer from element `start` on: after all queued work that uses the buffer, on
    /// whichever stream, and before it returns.
    ///
    /// # Errors
    /// [`crate::Error::TooShort`] when they do not fit; [`crate::Error::Driver`] when queued work failed;
    /// [`crate::Error::NotRecordable`] while a graph is recorded.
    fn write<T: Pod>(&self, buffer: &mut Self::Buffer<T>, start: usize, elements: &[T]) -> Result<()>;

    /// Refuses a buffer that calls here cannot use.
    ///
    /// # Errors
    /// [`crate::Error::OtherDevice`] names it as `what`.
    fn check_own<T: Pod>(&self, what: &'static str, buffer: &Self::Buffer<T>) -> Result<()>;

    /// Waits for queued work and copies a buffer's elements out.
    ///
    /// # Errors
    /// [`crate::Error::Driver`] when queued work failed.
    fn download<T: Pod>(&self, buffer: &Self::Buffer<T>) -> Result<Vec<T>>;

    /// Makes the scratch memory for calls of up to `max_tokens` tokens on any of `projections`.
    ///
    /// # Errors
    /// [`crate::Error::SizeTooLarge`] for too many tokens, [`crate::Error::Driver`] when there is no room.
    fn workspace(&self, projections: &[Projection], max_tokens: usize) -> Result<Self::Workspace>;

    /// Queues the routing of a layer alone, for calls of as many tokens on the route that this returns.
    ///
    /// # Errors
    /// Whatever [`RoutingTensors::check`] finds, before anything is launched.
    fn route(
        &self,
        workspace: &mut Self::Workspace,
        projection: &Projection,
        tokens: usize,
        routing: RoutingTensors<'_, Self::Space>,
    ) -> Result<Route>;

    /// Queues the sorting of pairs into blocks, the form in which vLLM hands a route on. It needs no
    /// workspace.
    ///
    /// # Errors
    /// Whatever [`Align::check`] finds, before anything is launched.
    fn align(&self, call: Align<'_, Self::Space>) -> Result<()>;

    /// Queues a whole call.
    ///
    /// # Errors
    /// Whatever [`Forward::check`] finds, or [`crate::Error::StaleRoute`], before anything is launched;
    /// [`crate::Error::Driver`] when a launch fails.
    fn forward<T: Element>(
        &self,
        workspace: &mut Self::Workspace,
        projection: &Projection,
        call: Forward<'_, Self::Space, T>,
    ) -> Result<Route>;

    /// Queues the first half of a call.
    ///
    /// # Errors
    /// Whatever [`Shrink::check`] finds, or [`crate::Error::StaleRoute`], before anything is launched;
    /// [`crate::Error::Driver`] when a launch fails.
    fn shrink<T: Element>(
        &self,
        workspace: &mut Self::Workspace,
        projection: &Projection,
        call: Shrink<'_, Self::Space, T>,
    ) -> Result<Route>;

    /// Queues the second half of a call.
    ///
    /// # Errors
    /// Whatever [`Expand::check`] finds, or [`crate::Error::StaleRoute`], before anything is launched;
    /// [`crate::Error::Driver`] when a launch fails.
    fn expand<T: Element>(
        &self,
        workspace: &mut Self::Workspace,
        projection: &Projection,
        call: Expand<'_, Self::Space, T>,
    ) -> Result<Route>;

    /// Waits for queued work.
    ///
    /// # Errors
    /// [`crate::Error::Driver`] when it failed.
    fn synchronize(&self) -> Result<()>;
}
