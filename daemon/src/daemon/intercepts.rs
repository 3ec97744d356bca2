//! The part of the local API that is about intercepts.

use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use tpd_api::exit::ExitCode;
use tpd_api::local::{Environment, Intercept, InterceptRequest, Other, Preview, Problem};

use crate::failure::Failure;
use crate::intercept::Keeper;

/// Longest request, bytes: a filter of the most and longest conditions is half of it.
const MAX_REQUEST: usize = 256 << 10;

/// The routes.
pub(super) fn routes(keeper: Arc<Keeper>) -> Router {
    Router::new()
        .route("/v1/intercepts", get(list).post(create))
        .route("/v1/intercepts/{namespace}/{name}", get(one).delete(remove))
        .route("/v1/intercepts/{namespace}/{name}/environment", get(environment))
        .route("/v1/preview", post(preview))
        .route("/v1/others", get(others))
        .route("/v1/others/{namespace}", get(others_in))
        .layer(DefaultBodyLimit::max(MAX_REQUEST))
        .with_state(keeper)
}

type Answer<T> = Result<Json<T>, Refusal>;

async fn list(State(keeper): State<Arc<Keeper>>) -> Json<Vec<Intercept>> {
    Json(keeper.list())
}

/// In a task of its own: an asker who goes away must not leave a change half made.
async fn create(
    State(keeper): State<Arc<Keeper>>,
    Json(request): Json<InterceptRequest>,
) -> Answer<Intercept> {
    whole(async move { keeper.create(request).await }).await.map(Json)
}

async fn one(
    State(keeper): State<Arc<Keeper>>,
    Path((namespace, name)): Path<(String, String)>,
) -> Answer<Intercept> {
    Ok(Json(keeper.get(&namespace, &name)?))
}

async fn remove(
    State(keeper): State<Arc<Keeper>>,
    Path((namespace, name)): Path<(String, String)>,
) -> Answer<()> {
    whole(async move { keeper.remove(&namespace, &name).await }).await.map(Json)
}

async fn environment(
    State(keeper): State<Arc<Keeper>>,
    Path((namespace, name)): Path<(String, String)>,
) -> Answer<Environment> {
    Ok(Json(keeper.environment(&namespace, &name).await?))
}

async fn preview(
    State(keeper): State<Arc<Keeper>>,
    Json(request): Json<InterceptRequest>,
) -> Answer<Preview> {
    Ok(Json(keeper.preview(&request).await?))
}

async fn others(State(keeper): State<Arc<Keeper>>) -> Answer<Vec<Other>> {
    Ok(Json(keeper.others(None).await?))
}

async fn others_in(State(keeper): State<Arc<Keeper>>, Path(namespace): Path<String>) -> Answer<Vec<Other>> {
    Ok(Json(keeper.others(Some(&namespace)).await?))
}

/// Runs to the end, whatever becomes of whoever asked for it.
async fn whole<T: Send + 'static>(
    change: impl Future<Output = Result<T, Failure>> + Send + 'static,
) -> Result<T, Refusal> {
    let ended = tokio::spawn(change).await;
    let ended = ended.unwrap_or_else(|error| {
        Err(Failure::new(ExitCode::Failure, "the daemon failed to do it").caused_by(&error))
    });
    Ok(ended?)
}

/// A failure as the local API answers it.
struct Refusal(Failure);

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Self {
        Self(failure)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = match self.0.code {
            ExitCode::Usage => StatusCode::UNPROCESSABLE_ENTITY,
            ExitCode::Forbidden => StatusCode::FORBIDDEN,
            ExitCode::NotFound => StatusCode::NOT_FOUND,
            ExitCode::Conflict => StatusCode::CONFLICT,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        (status, Json(Problem::from(self.0))).into_response()
    }
}
