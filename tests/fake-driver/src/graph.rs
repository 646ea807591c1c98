//! "Graph Management".

use crate::answer::*;
use crate::calls::*;
use crate::cuda_h::*;
use crate::state::*;

#[unsafe(no_mangle)]
extern "C" fn cuGraphInstantiateWithFlags(executable: *mut Handle, graph: Handle, flags: u64) -> Status {
    call("cuGraphInstantiateWithFlags", |driver| {
        let Graph { device, nodes } = driver.graphs.get(graph)?;
        let (device, nodes) = (*device, nodes.clone());
        driver.check_context(device, "the graph")?;
        require(flags == 0, INVALID_VALUE, format!("flags {flags:#x} are not modelled"))?;
        driver.unsafe_call()?;
        let handle = driver.handle();
        put(executable, handle)?;
        driver.executables.add(handle, Graph { device, nodes });
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphLaunch(executable: Handle, stream: Handle) -> Status {
    call("cuGraphLaunch", |driver| {
        let Graph { device, nodes } = driver.executables.get(executable)?;
        let (of_graph, nodes) = (*device, nodes.clone());
        let stream = driver.stream(stream)?;
        let &Stream { device, capture, .. } = driver.streams.get(stream)?;
        let what = format!("the graph is of device {of_graph}, the stream of {device}");
        require(of_graph == device, INVALID_VALUE, what)?;
        if let Some(capture) = capture {
            driver.captures.get_mut(capture)?.valid = false;
            return fault(CAPTURE_UNSUPPORTED, "a graph within a capture");
        }
        driver.check_default(stream)?;
        for node in &nodes {
            for (address, len) in &node.memory {
                let what = format!("the graph's {} names memory at {address:#x} that was freed", node.kind);
                require(driver.check_range(*address, *len, device).is_ok(), ILLEGAL_ADDRESS, what)?;
            }
            if let Some(function) = node.function {
                driver.functions.get(function)?;
            }
        }
        driver
            .run(stream, Work::new("graph_launch", format!("graph={executable:#x} nodes={}", nodes.len())))?;
        nodes.into_iter().try_for_each(|node| driver.run(stream, node))
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphDestroy(graph: Handle) -> Status {
    call("cuGraphDestroy", |driver| {
        driver.check_context(driver.graphs.get(graph)?.device, "the graph")?;
        driver.graphs.remove(graph).map(drop)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphExecDestroy(executable: Handle) -> Status {
    call("cuGraphExecDestroy", |driver| {
        driver.check_context(driver.executables.get(executable)?.device, "the graph")?;
        driver.unsafe_call()?;
        driver.executables.remove(executable).map(drop)
    })
}
